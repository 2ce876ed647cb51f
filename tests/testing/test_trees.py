"""The laws of selectors and splits catch what breaks them."""

import random

import jax.numpy as jnp
import pytest

import transferjax as tj
from transferjax.testing import _trees, check_selector, check_split

TREE = {"head": jnp.ones((2, 3)), "stem": jnp.ones(4)}


def test_a_selector_that_changes_its_mind_is_caught():
    calls = random.Random(0)
    fickle = tj.where(lambda path, leaf: path == "head" or calls.random() < 0.5, "fickle")
    with pytest.raises(tj.LawError, match="the law 'a selector answers alike each time' is broken at 'stem'"):
        for _ in range(5):
            check_selector(TREE, fickle)


def test_a_selector_that_looks_at_values_is_caught():
    law = "the law 'a selector looks at path, shape and dtype only' is broken at 'head'"
    with pytest.raises(
        tj.LawError, match=law + r": where\(values\) raised .*Error for the abstract leaf \(2, 3\) float32"
    ):
        check_selector(TREE, tj.where(lambda path, leaf: float(leaf.sum()) > 0, "values"))
    kind = tj.where(lambda path, leaf: isinstance(leaf, jnp.ndarray), "concrete")
    with pytest.raises(tj.LawError, match=law + r".* answers otherwise for the abstract leaf"):
        check_selector(TREE, kind)


def test_a_selector_that_compares_by_identity_is_caught():
    class Lonely:
        __hash__ = object.__hash__

        def __call__(self, path, leaf):
            return True

        def __eq__(self, other):
            return False

    with pytest.raises(tj.LawError, match=r"'equal selectors are equal, hash alike and print' is broken: Lonely"):
        check_selector(TREE, tj.Selector("lonely", Lonely()))


def test_a_selector_that_matches_nothing_raises():
    with pytest.raises(tj.SelectionError, match="matched none of 2 parameters"):
        check_selector(TREE, "neck")


@pytest.mark.parametrize(
    "broken, law",
    [
        (lambda tree, s: (tree, tj.split(tree, s)[1]), "a leaf is in one half of split"),
        (lambda tree, s: tuple(tj.copy(half) for half in tj.split(tree, s)), "split.. shares its leaves"),
        (lambda tree, s: tuple(half["head"] for half in tj.split(tree, s)), "both halves of split.. keep the outline"),
    ],
)
def test_a_broken_split_is_caught(broken, law, monkeypatch):
    check_split(TREE, "head")
    monkeypatch.setattr(_trees, "split", broken)
    with pytest.raises(tj.LawError, match=f"the law '{law}"):
        check_split(TREE, "head")


def test_a_broken_fill_is_caught(monkeypatch):
    monkeypatch.setattr(_trees, "fill", lambda a, b: {**tj.fill(a, b), "stem": jnp.zeros(4)})
    message = r"'fill\(\*split\(tree, s\)\) == tree' is broken at 'stem': \(4,\) float32 differs by up to 1; expected"
    with pytest.raises(tj.LawError, match=message):
        check_split(TREE, "head")
