"""The loss of a step as a program that is split for each batch size, and the form in which its residual is stored."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from transferjax._context import tracing_step
from transferjax._errors import DataError, TransferError, describe, listing
from transferjax._types import Loss
from transferjax.finetune._step import Step, loss_of, weights_of
from transferjax.program import inline
from transferjax.program._cut import Part, Split, Stored
from transferjax.program._hoist import (
    BATCH,
    CHANGING,
    EXTRA,
    FROZEN,
    KEY,
    OBJECTIVE,
    STEP,
    TRAINABLE,
    Input,
    split,
    split_alike,
)
from transferjax.tree import flatten


class At(NamedTuple):
    """The loss for one batch size."""

    split: Split
    inputs: tuple[Input, ...]
    outputs: Any  # the treedef of the Loss


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SplitLoss:
    """The loss of a step as a program, split for each batch size that comes."""

    step: Step
    state: Any
    frozen: Any
    batch: Any
    objective: Any
    count: int
    train: Any
    platform: str
    dtype: str
    copies: int
    known: dict[tuple[int, bool], At] = dataclasses.field(default_factory=dict)

    def at(self, count: int, stepped: bool) -> At:
        """The split for ``count`` examples, in a step whose number is known or outside of one."""
        if (count, stepped) not in self.known:
            self.known[count, stepped] = found = self._made(count, stepped)
            self._check(found, self.known[self.count, True] if self.known.keys() >= {(self.count, True)} else found)
        return self.known[count, stepped]

    def _made(self, count: int, stepped: bool) -> At:
        grow = lambda x: x.update(shape=(count, *x.shape[1:])) if x.shape and x.shape[0] == self.count else x
        s, batch = self.state, jax.tree.map(grow, self.batch)
        number = jax.ShapeDtypeStruct(jnp.shape(s.step), s.step.dtype)
        trees = (s.trainable, self.frozen, s.extra, self.objective, batch, s.key, number)

        def run(trainable, frozen, extra, objective, batch, key, number):
            with tracing_step(number) if stepped else contextlib.nullcontext():
                result = loss_of(self.step.tuning, objective, trainable, frozen, extra, batch, key, self.train)
            if result.weight is None and "weight" not in batch:
                return result
            return result._replace(weight=weights_of(result, batch))

        jaxpr, outputs = jax.make_jaxpr(run, return_shape=True)(*trees)
        program = inline(jaxpr, platform=self.platform)
        inputs = [Input(role, path) for role, tree in zip(_ROLES, trees, strict=True) for path in leaves_of(role, tree)]
        inputs = _unchanged_extra(program.jaxpr, inputs, outputs)
        alone = "a batch of one example does not show where the examples are: hoist with at least 2."
        found = split(
            program,
            inputs,
            count,
            size=lambda one: sum(kind.size * kind.dtype.itemsize for kind in self.entries(one, count).values()),
            platform=self.platform,
            forbid=alone if self.count == 1 else None,
            random=self.copies > 0,
        )
        if count == 1 < self.count:
            found = split_alike(self.at(self.count, stepped).split, program) or found
        return At(found, tuple(inputs), jax.tree.structure(outputs))

    def _check(self, found: At, first: At) -> None:
        form = lambda at: [
            (name, kind.shape[1:], kind.dtype)
            for one in at.split.stored
            for name, kind in self.entries(one, at.split.count).items()
        ]
        if form(found) != form(first):
            raise DataError(
                f"for a batch of {found.split.count} examples the cut is another than for the {self.count} that "
                f"hoist() was given: {listing([name for name, *_ in form(found)])}. Call hoist() with such a batch."
            )

    def rounds(self, one: Stored) -> bool:
        """Whether a value is stored in another type than its own."""
        own = one.name.startswith("hoisted_") and jnp.issubdtype(one.dtype, jnp.floating)
        narrow = self.dtype == "float32" or one.dtype.itemsize <= 2
        return own and not narrow and (self.dtype == "bfloat16" or len(one.shape(1)) > 1)

    def entries(self, one: Stored, count: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The residual's entries for one value."""
        shape = one.shape(count)
        if not self.rounds(one):
            return {one.name: jax.ShapeDtypeStruct(shape, one.dtype)}
        if self.dtype == "bfloat16":
            return {one.name: jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
        scale = jax.ShapeDtypeStruct(shape[:-1], jnp.float32)
        return {one.name: jax.ShapeDtypeStruct(shape, jnp.int8), f"{one.name}_scale": scale}

    def encode(self, one: Stored, value: Any) -> dict[str, Any]:
        if not self.rounds(one):
            return {one.name: value}
        if self.dtype == "bfloat16":
            return {one.name: value.astype(jnp.bfloat16)}
        scale = jnp.max(jnp.abs(value), axis=-1).astype(jnp.float32) / 127.0
        whole = jnp.round(value / jnp.where(scale > 0, scale, 1.0)[..., None]).astype(jnp.int8)
        return {one.name: whole, f"{one.name}_scale": scale}

    def decode(self, one: Stored, residual: Mapping[str, Any]) -> Any:
        value = residual[one.name]
        if self.rounds(one) and self.dtype == "int8":
            value = value.astype(jnp.float32) * residual[f"{one.name}_scale"][..., None]
        return value.astype(one.dtype)


_ROLES = (TRAINABLE, FROZEN, EXTRA, OBJECTIVE, BATCH, KEY, STEP)


def leaves_of(role: str, tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name; an objective's, which nobody named, by number."""
    if role == OBJECTIVE:
        return {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(tree))}
    return dict(flatten(tree)[0])


def _unchanged_extra(jaxpr: Any, inputs: list[Input], outputs: Loss) -> list[Input]:
    """The inputs, with those leaves of ``extra`` that do not come back as they went in marked as changing."""
    numbered = jax.tree.unflatten(jax.tree.structure(outputs), jaxpr.outvars)
    back = dict(flatten(numbered.extra)[0])
    changes = lambda one, var: one.role == EXTRA and back.get(one.path) is not var
    return [
        one._replace(role=CHANGING) if changes(one, var) else one for one, var in zip(inputs, jaxpr.invars, strict=True)
    ]


def arguments_of(at: At, part: Part, name: str, trees: Mapping[str, Any]) -> dict[int, Any]:
    """The leaves that a part reads, by the number of the input, each of the expected shape and type."""
    tables = {role: leaves_of(role, tree) for role, tree in trees.items()}
    found = {}
    for number in part.reads:
        role, path = at.inputs[number]
        role = EXTRA if role == CHANGING else role
        expected = at.split.program.jaxpr.invars[number].aval
        leaf = tables[role].get(path)
        error = DataError if role == BATCH else TransferError
        if leaf is None:
            raise error(
                f"the {name} reads '{path}' of {role}, which is not there. Expected {describe(expected)}, as "
                "hoist() was given it."
            )
        if jnp.shape(leaf) != expected.shape or jax.dtypes.result_type(leaf) != expected.dtype:
            raise error(
                f"the {name} expects '{path}' of {role} to be {describe(expected)}, got {describe(leaf)}. Call hoist() "
                "again for other shapes."
            )
        found[number] = leaf
    return found
