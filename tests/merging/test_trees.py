"""What can be merged, and what every method says of trees that cannot."""

import collections

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import transferjax as tj
from transferjax._errors import DataError
from transferjax.merging import slerp, soup, task_arithmetic

KERNEL = np.ones((2, 3), np.float32)
TREE = {"head": {"kernel": KERNEL, "bias": np.ones(3, np.float32)}}


def with_head(**leaves):
    return {"head": {**TREE["head"], **leaves}}


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([], r"soup\(\) expects at least 1 tree as models, got 0"),
        (TREE, r"soup\(\) expects a list of trees as models, got dict"),
        (KERNEL, r"soup\(\) expects a list of trees as models, got \(2, 3\) float32"),
        ("models", r"soup\(\) expects a list of trees as models, got str"),
        ([TREE, {}], r"soup\(\) got a tree without leaves as model 1"),
        ([TREE, {"head": {"kernel": KERNEL}}], "model 1 lacks 'head/bias', which model 0 has"),
        (
            [TREE, {"head": {"kernels": KERNEL, "bias": np.ones(3, np.float32)}}],
            "model 1 lacks 'head/kernel', which model 0 has. Expected trees of equal structure. Nearest: head/kernels",
        ),
        ([TREE, with_head(scale=KERNEL)], "model 1 has 'head/scale', which model 0 lacks"),
        (
            [TREE, with_head(kernel=KERNEL.T)],
            r"'head/kernel' is \(2, 3\) float32 in model 0 and \(3, 2\) float32 in model 1. Expected equal shapes and",
        ),
        (
            [TREE, with_head(kernel=KERNEL.astype(np.float16))],
            r"'head/kernel' is \(2, 3\) float32 in model 0 and \(2, 3\) float16 in model 1",
        ),
        ([TREE, TREE, with_head(kernel=KERNEL * np.nan)], "'head/kernel' has NaN or infinity in model 2"),
        ([TREE, with_head(bias=np.full(3, -np.inf, np.float32))], "'head/bias' has NaN or infinity in model 1"),
        ([with_head(bias=KERNEL * 1j)] * 2, r"'head/bias' is \(2, 3\) complex.* in model 0. Expected arrays of real"),
        ([with_head(bias="zeros")] * 2, "'head/bias' is str in model 0. Expected arrays of real numbers"),
        ([with_head(bias=jax.ShapeDtypeStruct((3,), "float32"))], r"'head/bias' is \(3,\) float32 in model 0"),
    ],
)
def test_unlike_trees(models, message):
    with pytest.raises(DataError, match=message):
        soup(models)


def test_the_base_is_called_the_base():
    with pytest.raises(DataError, match="model 0 lacks 'head/bias', which base has"):
        task_arithmetic(TREE, [{"head": {"kernel": KERNEL}}])
    with pytest.raises(DataError, match="'head/kernel' has NaN or infinity in base"):
        task_arithmetic(with_head(kernel=KERNEL * np.inf), [TREE])


def test_a_model_is_taken_apart_by_the_caller():
    model = tj.Model(None, None, TREE, {})
    with pytest.raises(DataError, match=r"soup\(\) got a Model as model 0. .*write model.params, or"):
        soup([model])
    with pytest.raises(DataError, match=r"slerp\(\) got a Model as b"):
        slerp(TREE, model, 0.5)
    with pytest.raises(DataError, match=r"soup\(\) expects a list of trees as models, got Model"):
        soup(model)


def test_a_checkpoint_goes_through_leafwise(tmp_path):
    tj.io.save(tmp_path / "w.npz", TREE)
    with pytest.raises(DataError, match=r"got an opened checkpoint as model 0. .*write leafwise\(soup, ...\)"):
        soup([tj.io.open(tmp_path / "w.npz")])


@pytest.mark.parametrize(
    ("leaf", "other"),
    [
        (np.arange(3), np.arange(3) + 1),
        (np.array([True, False]), np.array([True, True])),
        (3, 4),
        (jax.random.key(0), jax.random.key(1)),
    ],
    ids=["integers", "truth values", "a number", "keys"],
)
def test_what_is_no_float_must_be_equal_and_is_passed_through(leaf, other):
    model = lambda value: {"w": np.ones(2), "exact": value}
    assert soup([model(leaf), model(leaf)])["exact"] is leaf
    with pytest.raises(
        DataError, match=r"'exact' .* differs between model 0 and model 2, and integers and truth values"
    ):
        soup([model(leaf), model(leaf), model(other)])


def test_params_and_extra_are_merged_together():
    trees = [{"params": {"w": np.full(2, v)}, "extra": {"mean": np.full(2, -v)}} for v in (1.0, 3.0)]
    found = soup(trees)
    assert found["params"]["w"].tolist() == [2, 2] and found["extra"]["mean"].tolist() == [-2, -2]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float32, np.float64])
def test_the_dtype_stays(dtype):
    found = soup([{"w": np.full(3, value, dtype)} for value in (1.0, 2.0)])["w"]
    assert found.dtype == dtype and found.astype(np.float64).tolist() == [1.5, 1.5, 1.5]


def test_float64_is_computed_in_float64():
    assert soup([{"w": np.array([value])} for value in (1.0, 1.0 + 1e-15)])["w"][0] > 1.0


def test_numbers_of_python_and_numpy_stay_numbers():
    found = soup([{"a": 1.0, "b": np.float32(2.0), "c": 5}, {"a": 2.0, "b": np.float32(4.0), "c": 5}])
    assert found == {"a": 1.5, "b": 3.0, "c": 5} and type(found["a"]) is float and type(found["b"]) is np.float32


def test_jax_arrays_give_jax_arrays_where_the_first_tree_has_them():
    device = jax.devices()[0]
    first = {"a": jnp.ones(2), "b": jax.device_put(np.ones(2, np.float32), device), "c": np.ones(2, np.float32)}
    found = soup([first, {path: np.full(2, 3.0, np.float32) for path in "abc"}])
    assert isinstance(found["a"], jax.Array) and isinstance(found["b"], jax.Array) and type(found["c"]) is np.ndarray
    assert found["b"].committed and not found["a"].committed and found["a"].tolist() == [2, 2]


def test_the_containers_are_those_of_the_first_tree():
    first = collections.OrderedDict(b=[np.ones(1)], a=(np.zeros(1),))
    found = soup([first, {"a": [np.ones(1)], "b": [np.zeros(1)]}])
    assert isinstance(found, collections.OrderedDict) and list(found) == ["b", "a"] and isinstance(found["a"], tuple)


def test_a_single_array_is_a_tree():
    assert slerp(np.array([1.0, 1.0]), np.array([3.0, 3.0]), 0.5).tolist() == [2, 2]


def test_arrays_in_any_order_of_memory():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    found = soup([{"w": np.asfortranarray(array)}, {"w": array[::-1][::-1]}, {"w": array.T.copy().T}])
    np.testing.assert_array_equal(found["w"], array)
