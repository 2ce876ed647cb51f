"""The laws of selectors and of split and fill."""

from __future__ import annotations

import copy
from typing import Any

import jax

from transferjax._errors import describe
from transferjax._types import is_hole
from transferjax.testing._compare import broken, require_same
from transferjax.tree import Selector, as_selector, fill, flatten, mask, matches, split


def check_selector(tree: Any, selector: Selector | str) -> None:
    """A selector is a pure predicate over path, shape and dtype that prints, compares and combines.

    Args:
      tree: any pytree that the selector fits.
      selector: a ``Selector`` or a glob.

    Raises:
      LawError: a law is broken: answers alike twice, and for abstract leaves; ``s & ~s`` selects nothing and ``s | ~s``
        everything; equal copies are equal and hash alike; ``mask`` has the tree's outline and says what ``s`` says.
      SelectionError: the selector matches nothing.

    >>> check_selector({"head": 1.0, "stem": 2.0}, "head")
    """
    selector = as_selector(selector)
    flat, treedef = flatten(tree)
    chosen = set(matches(tree, selector))
    for path, leaf in flat:
        answer = selector(path, leaf)
        if selector(path, leaf) != answer or answer != (path in chosen):
            broken("a selector answers alike each time", f"{selector!r} changed its answer.", path)
        if _abstract_answer(selector, path, leaf) != answer:
            broken(
                "a selector looks at path, shape and dtype only",
                f"{selector!r} answers otherwise for the abstract leaf {describe(leaf)}.",
                path,
            )
        if (selector & ~selector)(path, leaf) or not (selector | ~selector)(path, leaf):
            broken("~s is the complement of s", f"{selector!r} and its complement overlap or leave a gap.", path)
    twin = copy.deepcopy(selector)
    if twin != selector or hash(twin) != hash(selector) or not repr(selector):
        broken("equal selectors are equal, hash alike and print", f"{type(selector.function).__name__} does not.")
    require_same(
        "mask(tree, s) is what s says",
        jax.tree.unflatten(treedef, [p in chosen for p, _ in flat]),
        mask(tree, selector),
    )


def check_split(tree: Any, selector: Selector | str) -> None:
    """``fill(*split(tree, selector)) == tree``, and the two halves share the outline and no leaf.

    Args:
      tree: any pytree.
      selector: a ``Selector`` or a glob.

    Raises:
      LawError: a leaf is lost, doubled, moved or changed; its path is named.
      SelectionError: the selector matches nothing.

    >>> check_split({"head": 1.0, "stem": 2.0}, "head")
    """
    selected, rest = split(tree, selector)
    flat, treedef = flatten(tree)
    chosen = set(matches(tree, selector))
    for name, half, inside in (("selected", selected, True), ("rest", rest, False)):
        flat_half, treedef_half = flatten(half, holes=True)
        if treedef_half != treedef:
            broken("both halves of split() keep the outline", f"'{name}' has another one.")
        for (path, leaf), (_, kept) in zip(flat, flat_half, strict=True):
            if (path in chosen) != inside and not is_hole(kept):
                broken("a leaf is in one half of split()", f"'{name}' has {describe(kept)}; expected a Hole.", path)
            if (path in chosen) == inside and kept is not leaf:
                broken("split() shares its leaves", f"'{name}' has another object than the tree.", path)
    require_same("fill(*split(tree, s)) == tree", tree, fill(selected, rest))
    require_same("fill(b, a) == fill(a, b)", tree, fill(rest, selected))


def _abstract_answer(selector: Selector, path: str, leaf: Any) -> bool:
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return selector(path, leaf)
    try:
        return selector(path, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    except Exception as error:
        broken(
            "a selector looks at path, shape and dtype only",
            f"{selector!r} raised {type(error).__name__} for the abstract leaf {describe(leaf)}.",
            path,
            error,
        )
