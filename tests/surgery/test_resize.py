"""Resizers: against timm, jax.image and scipy, the same size, kinds and dtypes, and what they refuse."""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.ndimage

from transferjax._errors import PlanError
from transferjax.surgery._interpolation import interpolation
from transferjax.surgery._resize import (
    adapt_input_channels,
    resize_patch_embedding,
    resize_position_embedding,
    resize_rows,
    row_numbers,
)

TIMM = np.load(Path(__file__).parents[1] / "fixtures" / "resize" / "resize.npz")
POSITION = sorted(name[:-4] for name in TIMM if name.startswith("position") and name.endswith("-out"))
PATCH = sorted(name[:-4] for name in TIMM if name.startswith("patch") and name.endswith("-out"))
KINDS = pytest.mark.parametrize("array_of", [np.asarray, jnp.asarray])


def grid(text):
    height, width = text.split("x")
    return int(height), int(width)


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


# Peers ---------------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("name", POSITION)
def test_position_embeddings_are_those_of_timm(name, array_of):
    _, method, old, new, prefix = name.split("-")
    array = array_of(TIMM[f"{name}-in"])
    out = resize_position_embedding(array, grid(new), old_grid=grid(old), prefix=int(prefix), method=method)
    assert np.abs(TIMM[f"{name}-out"]).max() > 0.02
    np.testing.assert_allclose(out, TIMM[f"{name}-out"], rtol=0, atol=1e-6)


@KINDS
@pytest.mark.parametrize("name", PATCH)
def test_patch_embeddings_are_those_of_timm(name, array_of):
    out = resize_patch_embedding(array_of(TIMM[f"{name}-in"]), grid(name.split("-")[2]))
    assert np.abs(TIMM[f"{name}-out"]).max() > 0.02
    np.testing.assert_allclose(out, TIMM[f"{name}-out"], rtol=0, atol=1e-6)


@KINDS
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_input_channels_are_those_of_timm(n, array_of):
    out = adapt_input_channels(array_of(TIMM["channels-in"]), n)
    np.testing.assert_allclose(out, TIMM[f"channels-{n}-out"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("method", "peer"), [("bicubic", "cubic"), ("bilinear", "linear")])
@pytest.mark.parametrize("new", [(5, 12), (1, 3), (9, 2), (18, 18)])
def test_position_embeddings_are_those_of_jax_image(method, peer, new):
    array = normal(9, 9, 3)
    out = resize_position_embedding(array.reshape(81, 3), new, prefix=0, method=method)
    np.testing.assert_allclose(out.reshape(*new, 3), jax.image.resize(array, (*new, 3), peer), rtol=0, atol=2e-6)


@pytest.mark.parametrize("new", [(5, 12), (1, 3), (9, 2), (18, 18)])
def test_align_corners_is_the_zoom_of_scipy(new):
    array = normal(9, 9, 3)
    zoomed = scipy.ndimage.zoom(array, (new[0] / 9, new[1] / 9, 1), order=1)
    out = resize_position_embedding(array.reshape(81, 3), new, prefix=0, method="align_corners").reshape(*new, 3)
    np.testing.assert_allclose(out, zoomed, rtol=0, atol=1e-6)
    if min(new) > 1:
        assert np.allclose(out[[0, 0, -1, -1], [0, -1, 0, -1]], array[[0, 0, -1, -1], [0, -1, 0, -1]])


# Meaning -------------------------------------------------------------------------------------------------------------


def test_an_enlarged_patch_answers_as_before():
    kernel, patch = normal(6, 8, 2, 5), normal(6, 8, 2, seed=1)
    larger = np.asarray(jax.image.resize(patch, (10, 12, 2), "cubic"))
    resized = resize_patch_embedding(kernel, (10, 12))
    answer = lambda k, p: np.einsum("hwio,hwi->o", k, p)
    np.testing.assert_allclose(answer(resized, larger), answer(kernel, patch), atol=2e-5)


def test_one_channel_is_exact_for_a_grey_image_and_more_channels_for_equal_ones():
    kernel, grey = normal(3, 3, 3, 4), normal(3, 3, seed=1)
    answer = lambda k: np.einsum("hwio,hw->o", k, grey)
    np.testing.assert_allclose(answer(adapt_input_channels(kernel, 1)), answer(kernel), atol=1e-5)
    np.testing.assert_allclose(answer(adapt_input_channels(kernel, 6)), answer(kernel), atol=1e-5)
    assert np.array_equal(adapt_input_channels(kernel[:, :, :2], 1), kernel[:, :, :2].sum(2, keepdims=True))


def test_prefix_tokens_pass_through():
    array = normal(1, 3 + 16, 4)
    out = resize_position_embedding(array, (6, 6), prefix=3)
    assert out.shape == (1, 39, 4) and np.array_equal(out[:, :3], array[:, :3])
    assert np.array_equal(out[0, 3:], resize_position_embedding(array[0, 3:], (6, 6), prefix=0))


def test_constants_stay_constants():
    for method in ("bicubic", "bilinear", "align_corners"):
        weights = interpolation(7, 12, method)
        assert np.allclose(weights.sum(1), 1) and np.allclose(interpolation(12, 5, method).sum(1), 1)
        assert np.allclose(interpolation(7, 7, method), np.eye(7))


def test_rows_keep_their_numbers_and_new_ones_are_filled():
    table = np.array([[1.0, 2.0], [3.0, 6.0]], np.float32)
    assert resize_rows(table, 4).tolist() == [[1, 2], [3, 6], [2, 4], [2, 4]]
    assert resize_rows(table, 3, "zeros").tolist() == [[1, 2], [3, 6], [0, 0]]
    assert resize_rows(table, 3, np.array([[7, 8]])).tolist() == [[1, 2], [3, 6], [7, 8]]
    initial = np.arange(6.0).reshape(3, 2)
    assert resize_rows(table, 3, initial).tolist() == [[1, 2], [3, 6], [4, 5]]


def test_rows_follow_a_mapping():
    table = np.array([[1.0, 2.0], [3.0, 6.0]], np.float32)
    assert resize_rows(table, 3, mapping={2: 0, 0: 1}).tolist() == [[3, 6], [2, 4], [1, 2]]
    assert resize_rows(table, 3, mapping=[1, None, 0]).tolist() == [[3, 6], [2, 4], [1, 2]]
    assert resize_rows(table, 3, [[9, 9]], mapping=[1, -1, 0]).tolist() == [[3, 6], [9, 9], [1, 2]]
    assert resize_rows(table, 1, mapping=range(1)).tolist() == [[1, 2]]
    assert resize_rows(table, 2, mapping=np.array([1, 1])).tolist() == [[3, 6], [3, 6]]
    assert resize_rows(table, 3, mapping=[None] * 3).tolist() == [[2, 4]] * 3


def test_rows_lie_along_any_axis():
    kernel = normal(4, 3)
    for axis in (1, -1):
        assert np.array_equal(resize_rows(kernel, 5, axis=axis), resize_rows(kernel.T, 5).T)
    assert np.array_equal(resize_rows(kernel, 2, mapping=[2, 0], axis=1), kernel[:, [2, 0]])


# Laws ----------------------------------------------------------------------------------------------------------------

RESIZED = {
    "position": (lambda a: resize_position_embedding(a, (5, 5)), (10, 4), (26, 4)),
    "patch": (lambda a: resize_patch_embedding(a, (5, 6)), (4, 4, 3, 2), (5, 6, 3, 2)),
    "grey": (lambda a: adapt_input_channels(a, 1), (4, 4, 3, 2), (4, 4, 1, 2)),
    "channels": (lambda a: adapt_input_channels(a, 5), (4, 4, 3, 2), (4, 4, 5, 2)),
    "rows": (lambda a: resize_rows(a, 6), (4, 3), (6, 3)),
    "rows of zeros": (lambda a: resize_rows(a, 6, "zeros", {0: 1}), (4, 3), (6, 3)),
    "initial rows": (lambda a: resize_rows(a, 6, np.ones((6, 3))), (4, 3), (6, 3)),
}


@KINDS
@pytest.mark.parametrize(
    ("resize", "shape"),
    [
        (lambda a: resize_position_embedding(a, (3, 3)), (10, 4)),
        (lambda a: resize_position_embedding(a, (2, 4), old_grid=(2, 4)), (1, 9, 4)),
        (lambda a: resize_patch_embedding(a, (4, 5)), (4, 5, 3, 2)),
        (lambda a: adapt_input_channels(a, 3), (4, 4, 3, 2)),
        (lambda a: adapt_input_channels(a, 12), (4, 4, 12, 2)),
        (lambda a: resize_rows(a, 4), (4, 3)),
        (lambda a: resize_rows(a, 4, mapping={n: n for n in range(4)}), (4, 3)),
    ],
)
def test_the_same_size_is_the_identity(resize, shape, array_of):
    array = array_of(normal(*shape))
    assert resize(array) is array


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("name", RESIZED)
def test_kind_and_dtype_stay_and_float32_is_computed_in(name, dtype):
    resize, came, made = RESIZED[name]
    array = normal(*came).astype(dtype)
    wanted = np.asarray(resize(array.astype(np.float32))).astype(dtype)
    for array_of in (np.asarray, jnp.asarray):
        out = resize(array_of(array))
        assert isinstance(out, type(array_of(array))) and out.dtype == dtype and out.shape == made
        assert np.allclose(
            np.asarray(out, np.float64), wanted.astype(np.float64), rtol=float(ml_dtypes.finfo(dtype).eps), atol=2e-6
        )


@pytest.mark.parametrize("name", RESIZED)
def test_float64_is_computed_in_float64(name):
    resize, came, _ = RESIZED[name]
    array = normal(*came, dtype=np.float64)
    out = resize(array)
    assert out.dtype == np.float64
    np.testing.assert_allclose(out, resize(array.astype(np.float32)), atol=1e-5)
    assert not np.any(out.astype(np.float32).astype(np.float64) == out) or name in ("rows of zeros", "initial rows")


@pytest.mark.parametrize("name", RESIZED)
def test_resizers_trace(name):
    resize, came, made = RESIZED[name]
    assert jax.eval_shape(resize, jax.ShapeDtypeStruct(came, jnp.bfloat16)) == jax.ShapeDtypeStruct(made, jnp.bfloat16)


# Refusals ------------------------------------------------------------------------------------------------------------

TOKENS, KERNEL, TABLE = np.zeros((10, 4)), np.zeros((4, 4, 3, 2)), np.zeros((4, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: resize_position_embedding(np.zeros((2, 10, 4)), (5, 5)),
         "position embeddings are [tokens, d] or [1, tokens, d]; (2, 10, 4) came."),
        (lambda: resize_position_embedding(TOKENS, (5, 5), prefix=0),
         "10 tokens after 0 prefix tokens form no square grid: (10, 4) came. Write old_grid=(h, w)"),
        (lambda: resize_position_embedding(TOKENS, (5, 5), prefix=12),
         "-2 tokens after 12 prefix tokens form no square grid"),
        (lambda: resize_position_embedding(TOKENS, (5, 5), old_grid=(2, 4)),
         "10 tokens came; the grid (2, 4) and 1 prefix tokens are 9."),
        (lambda: resize_position_embedding(TOKENS, 5),
         "grid 5 is malformed. Expected (height, width), two whole numbers of at least 1."),
        (lambda: resize_position_embedding(TOKENS, (5, 0)), "grid (5, 0) is malformed."),
        (lambda: resize_position_embedding(TOKENS, (5, 5), old_grid=(9,)), "old_grid (9,) is malformed."),
        (lambda: resize_position_embedding(TOKENS, (5, 5), prefix=-1),
         "prefix -1 is malformed. Expected a whole number of at least 0."),
        (lambda: resize_position_embedding(TOKENS, (5, 5), method="lanczos"),
         "method 'lanczos' is unknown. Expected one of 'bicubic', 'bilinear', 'align_corners'."),
        (lambda: resize_position_embedding(TOKENS.astype(int), (5, 5)),
         "resize_position_embedding() expects an array of floats, numpy or JAX; (10, 4) int64 came."),
        (lambda: resize_position_embedding([[1.0]], (5, 5)), "expects an array of floats, numpy or JAX; list came."),
        (lambda: resize_patch_embedding(TABLE, (2, 2)), "the kernel of a patch embedding is [h, w, in, out]; (4, 3)"),
        (lambda: resize_patch_embedding(KERNEL, (2, 2.0)), "size (2, 2.0) is malformed"),
        (lambda: adapt_input_channels(TABLE, 1), "the kernel of a convolution is [h, w, in, out]; (4, 3) came."),
        (lambda: adapt_input_channels(KERNEL, 0), "number of input channels 0 is malformed"),
        (lambda: adapt_input_channels(np.zeros((3, 3, 1, 8)), 3),
         "a kernel of 1 input channels is not made into one of 3: expected 3, those of an RGB image; (3, 3, 1, 8)"),
        (lambda: adapt_input_channels(np.zeros((3, 3, 12, 8)), 1), "a kernel of 12 input channels is not made into"),
        (lambda: resize_rows(TABLE, 3), "4 rows do not fit into 3. Write mapping= with the old row of each new row"),
        (lambda: resize_rows(TABLE, "3"), "number of rows '3' is malformed"),
        (lambda: resize_rows(TABLE, 3, mapping=[0, 1]), "the mapping has 2 entries; expected 3, one old row for each"),
        (lambda: resize_rows(TABLE, 2, mapping=[0, 4]), "the mapping names the old row 4; 4 rows came."),
        (lambda: resize_rows(TABLE, 2, mapping={2: 0}), "the mapping names the new row 2; expected whole numbers from"),
        (lambda: resize_rows(TABLE, 2, mapping=[0, 1.0]),
         "the mapping is malformed. Expected for each new row its old row, or -1 for none."),
        (lambda: resize_rows(TABLE, 2, mapping="01"), "the mapping is str; expected {new row: old row} or a list"),
        (lambda: resize_rows(TABLE, 5, "mode"), "fill 'mode' is unknown. Expected one of 'mean', 'zeros'."),
        (lambda: resize_rows(TABLE, 6, np.zeros((3, 3))),
         "fill has the shape (3, 3); expected (6, 3), or (2, 3) for the new rows alone."),
        (lambda: resize_rows(TABLE, 6, axis=2), "rows along axis 2 are expected; (4, 3) came."),
        (lambda: resize_rows(TABLE, 6, axis=-3), "axis -1 is malformed"),
        (lambda: resize_rows(np.zeros((0, 3)), 6), "rows along axis 0 are expected; (0, 3) came."),
    ],
)  # fmt: skip
def test_what_cannot_be_resized_is_said(make, message):
    with pytest.raises(PlanError) as error:
        make()
    assert message in str(error.value)


def test_row_numbers_of_a_dict_and_of_a_list():
    assert row_numbers({1: 5}, 3) == (-1, 5, -1)
    assert row_numbers([None, 2], 2) == (-1, 2)
