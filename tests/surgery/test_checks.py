"""Rules of one's own, and arguments in the wrong place: said by name, not by a traceback from within."""

import jax
import numpy as np
import optax
import pytest

from transferjax import Model, glob
from transferjax._errors import PlanError
from transferjax.surgery import (
    Lead,
    Move,
    Naming,
    Transform,
    assemble,
    carry,
    drop_layers,
    fresh,
    growth_report,
    insert_identity,
    map_layers,
    plan,
    reshape,
    rules_from_json,
    rules_to_json,
    rules_to_python,
    unit_map,
    widen,
)  # fmt: skip

SOURCE, TARGET = {"a": np.zeros((2, 3))}, {"a": np.zeros((3, 2))}
TREE = {"a": np.ones((4, 3)), "b": np.ones((3, 2))}
AXES = {"a": (1, "outgoing"), "b": (0, "incoming")}
LAYERS, PATTERN = {"0": {"w": np.ones(2)}, "1": {"w": np.ones(2)}}, r"(?P<i>\d+)/.*"
SAME = plan(TREE, TREE)


def naming(leads):
    return type("Mine", (Naming,), {"leads": lambda self, name, came: leads})()


def transform(op):
    return type("Mine", (Transform,), {"op": lambda self, came: op})(glob("**"))


def test_rules_of_ones_own_are_applied_in_plain_form():
    assert plan(SOURCE, TARGET, transform(["permute", [1, 0]])).moves[0].ops == (("permute", (1, 0)),)
    cut = plan(SOURCE, {"b": np.zeros((2, 2))}, naming([Lead("b", cut=["slice", 1, 0, 2])]))
    assert cut.moves[0].ops == (("slice", 1, 0, 2),)
    assert plan(SOURCE, SOURCE | {"b": np.zeros((2, 3))}, naming((Lead("a"), Lead("b")))).counts()["copied"] == 2


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (transform(("flip", 0)),
         "target 'a' from source 'a': Mine() makes no operation that is known here: operation 'flip' is unknown."),
        (transform("permute"), "Mine() makes no operation that is known here: operation 'permute' is malformed."),
        (naming("x"),
         "source 'a': Mine() leads 'a' to 'x'; expected a tuple of surgery.Lead(target path, ...), or None for a name"),
        (naming((Lead(5),)), "Mine() leads 'a' to (Lead(target=5,"),
        (naming(Lead("a")), "Mine() leads 'a' to Lead(target='a',"),
        (naming((Lead("a", cut=("flip", 0)),)), "Mine() makes no operation that is known here: operation 'flip'"),
        (naming((Lead("a", join=3),)), "Mine() makes no operation that is known here: operation 3 is malformed."),
        (reshape("a", lambda shape: shape[9]),
         "raised IndexError('tuple index out of range') for the shape (2, 3). Select only what it fits."),
    ],
)  # fmt: skip
def test_what_a_rule_of_ones_own_returns_is_checked(rule, message):
    with pytest.raises(PlanError) as error:
        plan(SOURCE, TARGET, rule)
    assert message in str(error.value)


STATE = optax.adam(1e-3).init(TREE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rules_to_json(fresh("a")), "rules_to_json() takes several rules, and fresh('a') is one."),
        (lambda: rules_to_json(None), "rules_to_json() takes a tuple of rules; NoneType came."),
        (lambda: rules_to_python(None), "rules_to_python() takes a tuple of rules; NoneType came."),
        (lambda: rules_to_python([1]), "rule 0 given to rules_to_python() is int; expected one such as fresh(...)."),
        (lambda: rules_from_json(None), "the rules come as NoneType; expected JSON text: path.read_text()."),
        (lambda: carry(STATE, SAME, STATE),
         "carry() expects a Plan first, got tuple. Write carry(plan, old_state, new_state)."),
        (lambda: carry(SAME, None, None),
         "old_state of carry() is None; expected the state of an optimizer, tx.init(params)."),
        (lambda: carry(SAME, STATE, None), "new_state of carry() is None"),
        (lambda: drop_layers(LAYERS, PATTERN, 1), "layers is the number 1; expected a list of layers. Write [1]."),
        (lambda: insert_identity(LAYERS, PATTERN, 0, "*/w"), "after is the number 0; expected a list of layers."),
        (lambda: map_layers(LAYERS, PATTERN, None), "layers is None; expected a list of layers, such as [0, 2]."),
        (lambda: map_layers(LAYERS, PATTERN, "01"), "layers is '01'; expected a list of layers"),
        (lambda: drop_layers(Model(None, None, LAYERS, {}), PATTERN, [1]),
         "a Model came; expected its arrays. Write the layers of {'params': model.params"),
        (lambda: widen(TREE, None, 6), "the mapping of axes is NoneType; expected {selector: (axis, 'outgoing' or"),
        (lambda: widen(TREE, {}, 6), "the mapping of axes is empty; expected {selector: (axis, 'outgoing' or"),
        (lambda: widen(Model(None, None, TREE, {}), AXES, 6),
         "a Model came; expected its arrays. Write widen({'params': model.params, 'extra': model.extra}, ...)"),
        (lambda: widen(TREE, AXES, 5, key=0), "key is int; expected a PRNG key, jax.random.key(0), or None."),
        (lambda: unit_map(3, 5, np.zeros(2)), "key is (2,) float64; expected a PRNG key"),
        (lambda: widen(jax.eval_shape(lambda: TREE), AXES, 6),
         "'a' is a jax.ShapeDtypeStruct, which holds no units. Pass arrays; for shapes only write jax.eval_shape("),
        (lambda: widen(jax.tree.map(lambda leaf: leaf.astype(int), TREE), AXES, 6),
         "'b' is (3, 2) int64 and reads the units, so copies are to have a share of its numbers each; expected"),
        (lambda: growth_report(TREE, TREE, 0, None),
         "growth_report() expects apply(tree, probe) as a function, got NoneType."),
        (lambda: growth_report(TREE, TREE, 0, lambda tree, x: x, tolerance="x"),
         "tolerance is 'x'; expected a number of at least 0, such as 1e-4."),
        (lambda: growth_report(TREE, TREE, 0, lambda tree, x: x, tolerance=-1), "tolerance is -1; expected a number"),
        (lambda: assemble(TREE, None),
         "assemble() expects arrays as {path: array}, got NoneType: write plan.apply(...)."),
        (lambda: SAME.apply(None), "source arrays come as NoneType; expected a function name -> array, or a mapping."),
        (lambda: SAME.with_source(3), "a source's fingerprint is a str, got int. Write source.fingerprint(), or None."),
        (lambda: Move("a", "b", (("permut", (1, 0)),)).run([np.ones((2, 2))]),
         "'a' from 'b': operation 'permut' is unknown."),
    ],
)  # fmt: skip
def test_what_is_given_is_checked_where_it_comes_in(make, message):
    with pytest.raises(PlanError) as error:
        make()
    assert message in str(error.value)


def test_integers_that_nothing_multiplies_and_keys_of_both_kinds_grow():
    whole = jax.tree.map(lambda leaf: leaf.astype(int), TREE)
    assert widen(whole, {"a": (1, "outgoing")}, 6)["a"].dtype == int and widen(whole, AXES, 3)["b"].dtype == int
    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        assert widen(TREE, AXES, 5, key)["a"].shape == (4, 5)
    assert jax.eval_shape(lambda tree: widen(tree, AXES, 6), TREE)["b"].shape == (6, 2)
