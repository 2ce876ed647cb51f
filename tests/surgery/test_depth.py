"""Layers as copies of others: the primitive under all changes of depth, and its recipes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transferjax._errors import PlanError
from transferjax.surgery._depth import drop_layers, insert_identity, interleave_layers, map_layers, stack_layers
from transferjax.tree import nest, paths

BLOCKS = r"blocks/(?P<i>\d+)/.*"
FLAT = {f"blocks/{i}/{leaf}": np.full((2,), 10.0 * i + n) for i in range(3) for n, leaf in enumerate(("in", "out"))}
TREE = {**nest(FLAT), "head": np.ones(4)}


def numbers(tree, leaf="in"):
    """The old layer of each new one."""
    found = paths(tree)
    count = sum(path.endswith(f"/{leaf}") for path in found)
    return [int(found[f"blocks/{i}/{leaf}"][0] // 10) for i in range(count)]


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (map_layers(TREE, BLOCKS, [2, 0, 0, 1]), [2, 0, 0, 1]),
        (map_layers(TREE, BLOCKS, (1,)), [1]),
        (map_layers(TREE, BLOCKS, range(3)), [0, 1, 2]),
        (stack_layers(TREE, BLOCKS), [0, 1, 2, 0, 1, 2]),
        (interleave_layers(TREE, BLOCKS, 3), [0, 0, 0, 1, 1, 1, 2, 2, 2]),
        (drop_layers(TREE, BLOCKS, [1]), [0, 2]),
        (insert_identity(TREE, BLOCKS, [0, 2], "**/out"), [0, 0, 1, 2, 2]),
    ],
)
def test_layers_come_from_where_the_recipe_says(made, expected):
    assert numbers(made) == expected
    assert list(made["blocks"]) == [str(i) for i in range(len(expected))]
    assert all(list(block) == ["in", "out"] for block in made["blocks"].values())
    assert made["head"] is TREE["head"]


def test_flat_trees_stay_flat_and_in_natural_order():
    made = stack_layers(FLAT, BLOCKS, 4)
    assert list(made)[:3] == ["blocks/0/in", "blocks/0/out", "blocks/1/in"] and list(made)[-1] == "blocks/11/out"
    assert numbers(made) == [0, 1, 2] * 4


def test_only_copies_are_zero_and_copies_are_arrays_of_their_own():
    for array_of in (np.asarray, jnp.asarray):
        tree = jax.tree.map(array_of, TREE)
        made = map_layers(tree, BLOCKS, [0, 1, 1, 2], zero="blocks/*/out")
        assert not made["blocks"]["2"]["out"].any() and made["blocks"]["1"]["out"] is tree["blocks"]["1"]["out"]
        assert isinstance(made["blocks"]["2"]["out"], type(tree["head"]))
        assert made["blocks"]["2"]["in"] is not made["blocks"]["1"]["in"]
        assert np.array_equal(made["blocks"]["2"]["in"], made["blocks"]["1"]["in"])
    made["blocks"]["2"]["in"] = made["blocks"]["2"]["in"] + 1
    assert numbers(TREE) == [0, 1, 2]


def test_params_and_extra_deepen_together():
    both = {"params": TREE, "extra": {"blocks": {str(i): {"mean": np.full(2, 10.0 * i)} for i in range(3)}}}
    made = drop_layers(both, r"(params|extra)/blocks/(?P<i>\d+)/.*", [0])
    assert numbers(made["params"]) == numbers(made["extra"], "mean") == [1, 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: map_layers(TREE, BLOCKS, [0, 3]), "layers name 3; expected at least one of the layers 0, 1, 2."),
        (lambda: map_layers(TREE, BLOCKS, []), "layers name none; expected at least one of the layers 0, 1, 2."),
        (lambda: map_layers(TREE, BLOCKS, [0.0]), "layers name 0.0; expected at least one"),
        (lambda: map_layers(TREE, BLOCKS, [0, 1], zero="**/out"),
         "zero='**/out' selects no leaf of a copied layer. Write the paths of the last projections."),
        (lambda: insert_identity(TREE, BLOCKS, [5], "**/out"), "after names layer 5; expected some of the layers 0, 1"),
        (lambda: insert_identity(TREE, BLOCKS, [1], "**/down"), "zero='**/down' selects no leaf of a copied layer."),
        (lambda: drop_layers(TREE, BLOCKS, [4]), "layers to drop name 4; expected some of the layers 0, 1, 2."),
        (lambda: drop_layers(TREE, BLOCKS, [0, 1, 2]), "layers name none; expected at least one"),
        (lambda: stack_layers(TREE, BLOCKS, 1), "times is 1; expected a whole number of at least 2."),
        (lambda: interleave_layers(TREE, BLOCKS, 2.0), "times is 2.0; expected a whole number of at least 2."),
        (lambda: stack_layers(TREE, "blocks/.*"), "'blocks/.*' has no group i. Write (?P<i>\\d+) where the layer's"),
        (lambda: stack_layers(TREE, "("), "the pattern '(' is malformed"),
        (lambda: stack_layers(TREE, r"layers/(?P<i>\d+)/.*"),
         "matches none of 7 paths (blocks/0/in, blocks/0/out, blocks/1/in and 4 more)."),
        (lambda: stack_layers(TREE, "(?P<i>[a-z]+)"), "group i of the pattern matches 'head' in 'head'; expected"),
        (lambda: stack_layers({"blocks": [{"w": 1.0}]}, BLOCKS),
         "layers of a dict of such containers cannot be numbered anew: expected nested dicts with string keys"),
        (lambda: stack_layers([{"w": 1.0}], r"(?P<i>\d+)/w"), "layers of a list of such containers cannot be numbered"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(make, message):
    with pytest.raises(PlanError) as error:
        make()
    assert message in str(error.value)
