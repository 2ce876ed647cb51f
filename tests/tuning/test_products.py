"""LoHa, LoKr, HiRA and MiSS: formulas, agreement with peft, and what raises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax.tuning._products import _halves

TRANSPOSED = lambda w: w.T
LOHA = {
    "loha_w1_a": ("hada_w1_b", TRANSPOSED),
    "loha_w1_b": ("hada_w1_a", TRANSPOSED),
    "loha_w2_a": ("hada_w2_b", TRANSPOSED),
    "loha_w2_b": ("hada_w2_a", TRANSPOSED),
}
LOKR = {
    "lokr_w1": ("lokr_w1", TRANSPOSED),
    "lokr_w2": ("lokr_w2", TRANSPOSED),
    "lokr_w2_a": ("lokr_w2_b", TRANSPOSED),
    "lokr_w2_b": ("lokr_w2_a", TRANSPOSED),
}
HIRA = {
    "hira_a": ("hira_A", lambda w: w.T if w.ndim == 2 else w.transpose(2, 3, 1, 0)),
    "hira_b": ("hira_B", lambda w: w.reshape(w.shape[:2]).T),
}
TUNINGS = {"loha": tj.tuning.loha, "lokr": tj.tuning.lokr, "hira": tj.tuning.hira, "miss": tj.tuning.miss}


def init(tuning, params):
    return tuning.init(jax.random.key(0), params)


@pytest.mark.parametrize(
    "method, tuning, names",
    [
        ("loha", tj.tuning.loha("**/kernel", 3, alpha=6.0), LOHA),
        ("lokr", tj.tuning.lokr("**/kernel", 8, alpha=4.0), LOKR),
        ("lokr_low", tj.tuning.lokr("**/kernel", 1, alpha=2.0), LOKR),
        ("hira", tj.tuning.hira("**/kernel", 3), HIRA),
        ("miss", tj.tuning.miss("**/kernel", 5), {"miss": ("miss_block", lambda w: w)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_dense_network_agrees_with_peft(against_peft, method, tuning, names):
    against_peft("dense", method, tuning, names)


def unfolded(w):
    """peft's ``[r, in * h * w]`` as ``[h, w, in, r]`` for the fixture's 3 x 3 kernel."""
    return w.reshape(len(w), -1, 3, 3).transpose(2, 3, 1, 0)


def test_a_convolution_by_loha_agrees_with_peft(against_peft):
    names = {**LOHA, "loha_w1_a": ("hada_w1_b", unfolded), "loha_w2_a": ("hada_w2_b", unfolded)}
    against_peft("conv", "loha", tj.tuning.loha("**/kernel", 2, alpha=6.0), names)


def test_a_convolution_by_hira_agrees_with_peft(against_peft):
    against_peft("conv", "hira", tj.tuning.hira("**/kernel", 2), HIRA)


def test_miss_repeats_its_rows_and_cuts_the_last_stretch():
    tuning = tj.tuning.miss("w", 2)
    trainable, frozen = init(tuning, {"w": jnp.zeros((5, 2))})
    trainable["w"]["miss"] = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_array_equal(tuning.merge(trainable, frozen)["w"], [[1, 2], [3, 4], [1, 2], [3, 4], [1, 2]])


@pytest.mark.parametrize("size, halves", [(1, (1, 1)), (7, (1, 7)), (12, (3, 4)), (128, (8, 16)), (256, (16, 16))])
def test_lokr_splits_near_the_square_root(size, halves):
    assert _halves(size) == halves


@pytest.mark.parametrize("name", ["loha", "hira", "miss"])
def test_ranks_may_differ_per_pattern(name):
    params = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}
    trainable, _ = init(TUNINGS[name]("*", {"a": 1, "**": 2}), params)
    first = {key: next(iter(leaf.values())).shape for key, leaf in trainable.items()}
    assert 1 in first["a"] and 2 in first["b"]


@pytest.mark.parametrize("name", TUNINGS)
def test_a_bad_rank_raises(name):
    with pytest.raises(
        tj.SelectionError, match=rf"{name}\(\) expects rank to be a whole number of at least 1, got 1\.5"
    ):
        TUNINGS[name]("w", 1.5)


@pytest.mark.parametrize("name", ["loha", "hira", "miss"])
def test_a_rank_above_the_widths_raises(name):
    message = rf"{name}\(\) got rank 9 for the kernel 'w' \(4, 3\) float32: expected at most [34], "
    with pytest.raises(tj.SelectionError, match=message):
        init(TUNINGS[name]("w", 9), {"w": jnp.ones((4, 3))})


@pytest.mark.parametrize("name, forms", [("loha", r"\[in, out\] or \[h, w, in, out\]"), ("lokr", r"\[in, out\]")])
def test_what_is_no_kernel_raises(name, forms):
    message = rf"{name}\(\) expects floating-point kernels {forms}; 'w' is \(4,\) float32"
    with pytest.raises(tj.SelectionError, match=message):
        init(TUNINGS[name]("w", 1), {"w": jnp.ones(4)})


@pytest.mark.parametrize("alpha", [0, -1.0, "8", True])
def test_a_bad_alpha_raises(alpha):
    with pytest.raises(tj.SelectionError, match=r"loha\(\) expects alpha as a number above 0, or None for the rank"):
        tj.tuning.loha("w", 1, alpha=alpha)
