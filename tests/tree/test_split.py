"""Split, fill, copy and summary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import transferjax as tj

TREE = {"head": {"bias": 1.0, "kernel": 2.0}, "stem": [3.0, 4.0]}


def test_split_leaves_holes_and_fill_closes_them():
    selected, rest = tj.split(TREE, "head/kernel")
    assert selected == {"head": {"bias": tj.Hole(), "kernel": 2.0}, "stem": [tj.Hole(), tj.Hole()]}
    assert rest == {"head": {"bias": 1.0, "kernel": tj.Hole()}, "stem": [3.0, 4.0]}
    assert tj.fill(selected, rest) == tj.fill(rest, selected) == TREE


def test_where_both_sides_have_a_hole_it_stays():
    assert tj.fill({"a": tj.Hole(), "b": tj.Hole()}, {"a": tj.Hole(), "b": 1.0}) == {"a": tj.Hole(), "b": 1.0}


def test_a_hole_is_no_leaf_and_prints_itself():
    assert repr(tj.Hole()) == "Hole" and tj.Hole() == tj.Hole() and jax.tree.leaves(tj.Hole()) == []
    assert jax.jit(lambda tree: tree)({"a": tj.Hole()}) == {"a": tj.Hole()}


def test_fill_names_where_the_outlines_differ():
    with pytest.raises(tj.SelectionError) as error:
        tj.fill({"a": 1.0, "b": tj.Hole()}, {"a": tj.Hole(), "c": 1.0})
    assert str(error.value) == (
        "fill() expects two trees of one outline; the first path that only one of them has is 'b'. "
        "Both must come from one split()."
    )
    with pytest.raises(tj.SelectionError, match=r"outline; their containers differ\. Both must come from one split"):
        tj.fill({"a": [tj.Hole()]}, {"a": (1.0,)})
    with pytest.raises(tj.SelectionError) as error:
        tj.fill({"a": jnp.zeros((2, 3))}, {"a": np.zeros(4, np.int8)})
    assert str(error.value) == (
        "fill() found a leaf on both sides at 'a': (2, 3) float32 and (4,) int8. Expected a Hole on one side."
    )


def test_split_shares_and_copy_does_not():
    tree = {"a": jnp.zeros(2), "b": np.ones(2, np.float32), "k": jax.random.key(1), "n": 3, "f": abs}
    selected, _ = tj.split(tree, "a")
    assert selected["a"] is tree["a"]
    kept = tj.copy(tree)
    jax.jit(lambda x: x + 1, donate_argnums=0)(tree["a"])
    assert tree["a"].is_deleted() and kept["a"].tolist() == [0.0, 0.0]
    tree["b"][0] = 5.0
    assert isinstance(kept["b"], jax.Array) and kept["b"].tolist() == [1.0, 1.0]
    assert kept["k"].dtype == tree["k"].dtype and kept["k"] is not tree["k"]
    assert kept["n"] == 3 and kept["f"] is abs


def test_an_nnx_state_and_module_can_be_split_and_filled():
    module = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    for tree in (nnx.state(module), module):
        selected, rest = tj.split(tree, "kernel")
        assert list(tj.paths(selected)) == ["kernel"] and list(tj.paths(rest)) == ["bias"]
        whole = tj.fill(selected, rest)
        assert type(whole) is type(tree) and jax.tree.structure(whole) == jax.tree.structure(tree)
        assert tj.paths(whole)["kernel"] is tj.paths(tree)["kernel"]


def test_summary_counts_leaves_parameters_and_bytes():
    tree = {"head": np.zeros((2, 3), np.float32), "stem": {"10": jnp.zeros(4, jnp.bfloat16), "2": 1.0}}
    report = tj.summary(tree, tj.label(tree, {"new": "head"}, default="old"))
    assert report.rows == (
        ("head", "(2, 3)", "float32", 6, 24, "new"),
        ("stem/2", "()", "float", 1, 0, "old"),
        ("stem/10", "(4,)", "bfloat16", 4, 8, "old"),
    )
    assert report.metadata == {"leaves": 3, "parameters": 11, "bytes": 32, "label new": 6, "label old": 5}
    assert tj.summary(tree).columns == ("path", "shape", "dtype", "parameters", "bytes")
    assert tj.summary(tree, tj.mask(tree, "head")).column("label") == [True, False, False]
    with pytest.raises(tj.SelectionError, match="expects labels of the tree's outline: make them with label"):
        tj.summary(tree, {"head": "new"})


def test_summary_of_a_model_has_its_params_and_then_its_extra():
    params, extra = (
        {"fc": np.zeros((2, 3), np.float32), "stem": np.zeros(4, np.float32)},
        {"mean": np.zeros(5, np.int8)},
    )
    report = tj.summary(tj.Model(abs, None, params, extra), tj.mask(params, "fc"))
    assert report.rows == (
        ("fc", "(2, 3)", "float32", 6, 24, True),
        ("stem", "(4,)", "float32", 4, 16, False),
        ("extra/mean", "(5,)", "int8", 5, 5, None),
    )
    assert report.metadata == {
        "leaves": 2, "parameters": 10, "bytes": 40, "label True": 6, "label False": 4,
        "extra leaves": 1, "extra bytes": 5, "extra values": 5,
    }  # fmt: skip
    assert tj.summary(tj.Model(abs, None, params, extra)).column("path") == ["fc", "stem", "extra/mean"]
