"""Units as copies of others: the primitive under all changes of width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transferjax import glob, regex
from transferjax._errors import PlanError
from transferjax.surgery._units import map_units, unit_map

TREE = {"a": np.arange(6.0).reshape(2, 3), "b": np.array([1.0, 2.0, 4.0]), "c": np.arange(3.0)[:, None] + 1}
AXES = {"a": (1, "outgoing"), "b": (0, "outgoing"), "c": (0, "incoming")}


def test_outgoing_axes_are_copied_and_incoming_ones_shared():
    out = map_units(TREE, AXES, [0, 1, 2, 1, 1])
    assert out["a"].tolist() == [[0, 1, 2, 1, 1], [3, 4, 5, 4, 4]]
    assert out["b"].tolist() == [1, 2, 4, 2, 2]
    assert np.allclose(out["c"][:, 0], [1, 2 / 3, 3, 2 / 3, 2 / 3])


def test_given_shares_multiply_what_reads():
    out = map_units(TREE, AXES, [0, 1, 2, 1], shares=[1, 0.25, 1, 0.75])
    assert out["c"][:, 0].tolist() == [1, 0.5, 3, 1.5] and out["b"].tolist() == [1, 2, 4, 2]


def test_units_that_stay_are_the_identity():
    out = map_units(TREE, AXES, range(3))
    assert all(np.array_equal(out[name], TREE[name]) for name in TREE)


def test_fewer_units_are_a_selection_in_the_order_given():
    out = map_units(TREE, AXES, np.array([2, 0]))
    assert out["a"].tolist() == [[2, 0], [5, 3]] and out["c"][:, 0].tolist() == [3, 1]


def test_layouts_of_several_entries_per_unit():
    tree = {"x": np.arange(6), "y": np.arange(6)}
    axes = {"x": (0, "outgoing", "blocks"), "y": (-1, "outgoing", "interleaved")}
    out = map_units(tree, axes, [0, 1, 2, 0], count=3)
    assert out["x"].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert out["y"].tolist() == [0, 1, 2, 0, 3, 4, 5, 3]
    axes = {"x": (0, "incoming", "blocks"), "y": (0, "incoming", "interleaved")}
    out = map_units(jax.tree.map(np.float64, tree), axes, [0, 1, 2, 0], count=3, shares=[0.25, 1, 1, 0.75])
    assert out["x"].tolist() == [0, 0.25, 2, 3, 4, 5, 0, 0.75]
    assert out["y"].tolist() == [0, 1, 2, 0, 0.75, 4, 5, 2.25]


def test_selectors_of_any_kind_name_the_leaves():
    assert map_units(TREE, {glob("a"): (1, "outgoing"), regex("[bc]"): (0, "outgoing")}, [0])["c"].shape == (1, 1)


def test_the_primitive_traces_and_keeps_kinds():
    tree = jax.tree.map(jnp.asarray, TREE)
    out = jax.jit(lambda t: map_units(t, AXES, [0, 1, 2, 0]))(tree)
    assert np.allclose(out["c"], map_units(TREE, AXES, [0, 1, 2, 0])["c"])
    assert jax.eval_shape(lambda t: map_units(t, AXES, [0] * 7), tree)["a"].shape == (2, 7)


def test_unit_map_keeps_the_first_and_draws_the_rest():
    assert unit_map(3, 6).tolist() == [0, 1, 2] * 2 and unit_map(3, 3).tolist() == [0, 1, 2]
    drawn = unit_map(3, 300, jax.random.key(0))
    assert drawn[:3].tolist() == [0, 1, 2] and np.bincount(drawn).min() > 50 and len(drawn) == 300
    assert np.array_equal(drawn, unit_map(3, 300, jax.random.key(0)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: map_units(TREE, {**AXES, "{a,b}": (0, "outgoing")}, [0]),
         "'a' is selected by 'a' and by '{a,b}'. Expected one axis per leaf and call: narrow one of them"),
        (lambda: map_units(TREE, {"a": (0, "outgoing"), "b": (0, "outgoing")}, [0]),
         "'b' has 3 units along its axis, 'a' says 2. Where an axis holds several entries per unit, write"),
        (lambda: map_units(TREE, AXES, [0], count=4), "'a' has 3 units along its axis, count says 4."),
        (lambda: map_units(TREE, {"a": (1, "outgoing", "blocks")}, [0]),
         "every axis has a layout, so the number of units is not known. Write count= with it."),
        (lambda: map_units(TREE, {"a": (1, "outgoing", "blocks")}, [0], count=2),
         "'a' has 3 entries along axis 1; expected a multiple of the 2 units."),
        (lambda: map_units(TREE, {"a": (1, "ingoing")}, [0]),
         "the axis of 'a' is (1, 'ingoing'); expected (axis, 'outgoing' or 'incoming'), with 'blocks' or"),
        (lambda: map_units(TREE, {"a": 1}, [0]), "the axis of 'a' is 1; expected (axis, 'outgoing' or 'incoming')"),
        (lambda: map_units(TREE, {"a": (1, "outgoing", "heads")}, [0]), "the axis of 'a' is (1, 'outgoing', 'heads')"),
        (lambda: map_units(TREE, {"a": (2, "outgoing")}, [0]), "'a' has no axis 2: it is (2, 3) float64."),
        (lambda: map_units({"a": 1.0}, {"a": (0, "outgoing")}, [0]), "'a' has no axis 0: it is float."),
        (lambda: map_units(TREE, AXES, []), "units are malformed. Expected for each new unit the number of an old one"),
        (lambda: map_units(TREE, AXES, [0.5]), "units are malformed."),
        (lambda: map_units(TREE, AXES, [0, 3]), "units go from 0 to 3; expected 0 to 2."),
        (lambda: map_units(TREE, AXES, [-1, 1]), "units go from -1 to 1; expected 0 to 2."),
        (lambda: map_units(TREE, AXES, [0, 1], shares=[1.0]),
         "shares have the shape (1,); expected one per new unit, (2,)."),
        (lambda: map_units(TREE, AXES, [0, 0], shares=[0.5, 0.6]),
         "shares of the copies of one unit do not sum to 1. Divide each by the sum over its unit."),
        (lambda: unit_map(3, 2), "3 units do not grow to 2. Expected more; write narrow(...) for fewer."),
        (lambda: unit_map(0, 2), "0 units do not grow to 2."),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(make, message):
    with pytest.raises(PlanError) as error:
        make()
    assert message in str(error.value)
