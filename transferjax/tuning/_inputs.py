"""What enters each kernel of a network: sums over the rows that meet it in its product."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from transferjax._errors import DataError, SelectionError, describe
from transferjax._types import Batch, Model
from transferjax.tree import Selector, flatten, matches
from transferjax.tuning._lora import _letters

_VIEWS = ("convert_element_type", "transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "copy")
_NEUTRAL = "default"
"""Of what differs by platform, the branch for any other one: it holds the product as the network wrote it."""
_OPENED = {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "checkpoint": "jaxpr", "remat2": "jaxpr"}


class Moments(NamedTuple):
    """Sums over the inputs of one kernel, float64; those of several passes may be added.

    Attributes:
      count: number of rows: every example, position and use of the kernel is one.
      total: ``[in]``, the sum of the rows.
      products: ``[in, in]``, the sum of their outer products.
    """

    count: float
    total: np.ndarray
    products: np.ndarray


def input_moments(model: Model, selector: Selector | str, batches: Iterable[Batch]) -> dict[str, Moments]:
    """The first and second moments of what enters each selected kernel, from passes in inference mode.

    The rows are the operands of the kernel's own product, whatever the framework calls the layer; those of a
    convolution are its patches, padding included. All positions of a text count, padded ones too. The products of one
    kernel take ``in * in`` float64 numbers on the host.

    Args:
      model: any Model.
      selector: kernels as ``transferjax.lora`` takes them, but no stack of layers that ``scan`` runs over.
      batches: dicts with ``inputs``; a few hundred examples tell the directions.

    Returns:
      ``{path: Moments}``; the widths of a convolution are in the order ``[h * w * in]`` of its kernel.

    Raises:
      SelectionError: the selector matches nothing, a selected leaf is no kernel, meets no data, or something else than
        a product over its inputs is done with it: the path and the operation are named.
      DataError: there is no batch, or one is no dict with ``inputs``.

    >>> import jax.numpy as jnp, transferjax as tj
    >>> model = tj.interop.pure(lambda params, x: x @ params["kernel"], {"kernel": jnp.ones((2, 3))})
    >>> found = input_moments(model, "kernel", [{"inputs": jnp.array([[1.0, 0.0], [3.0, 1.0]])}])
    >>> found["kernel"].count, found["kernel"].total.tolist(), found["kernel"].products.tolist()
    (2.0, [4.0, 1.0], [[10.0, 3.0], [3.0, 1.0]])
    """
    flat, treedef = flatten(model.params)
    chosen = set(matches(model.params, selector))
    letters = {path: kernel_axes(path, leaf) for path, leaf in flat if path in chosen}

    @jax.jit
    def measure(params: Any, extra: Any, inputs: Any) -> dict[str, tuple[Any, Any, Any]]:
        leaves = jax.tree.leaves(params)
        own = {path: leaf for (path, _), leaf in zip(flat, leaves, strict=True) if path in chosen}

        def forward(own):
            filled = [own.get(path, leaf) for (path, _), leaf in zip(flat, leaves, strict=True)]
            return model.apply(jax.tree.unflatten(treedef, filled), extra, inputs)[0]

        return _measured(forward, own, letters)

    sums: dict[str, Moments] = {}
    for batch in batches:
        if not isinstance(batch, Mapping) or "inputs" not in batch:
            raise DataError(f"input_moments() expects batches as dicts with 'inputs', got {describe(batch)}.")
        for path, found in measure(model.params, model.extra, batch["inputs"]).items():
            count, total, products = (np.asarray(x, np.float64) for x in found)
            before = sums.get(path, Moments(0.0, np.zeros_like(total), np.zeros_like(products)))
            sums[path] = Moments(before.count + float(count), before.total + total, before.products + products)
    if not sums:
        raise DataError("input_moments() got no batch. Expected at least one dict with 'inputs'.")
    return sums


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """A selected kernel on its way to its product: which of its own axes each axis is, ``None`` for one of size 1."""

    value: Any
    path: str
    axes: tuple[int | None, ...]


def _measured(forward: Callable[[Any], Any], own: Mapping[str, Any], letters: Mapping[str, str]) -> dict[str, Any]:
    """``{path: (count, total, products)}`` of one pass."""
    from transferjax.program import interpret, rebind

    sums: dict[str, Any] = {}

    def rule(eqn: Any, values: list[Any]) -> Sequence[Any] | None:
        kernels = [value for value in values if isinstance(value, _Kernel)]
        if not kernels:
            return None
        name, kernel = eqn.primitive.name, kernels[0]
        if name in _OPENED:  # nothing is differentiated here, so a derivative of its own is none to lose
            return interpret(_closed(eqn.params[_OPENED[name]]), values, rule=rule, platform=_NEUTRAL)
        plain = rebind(eqn, [value.value if isinstance(value, _Kernel) else value for value in values])
        if name in _VIEWS:
            return [_Kernel(plain[0], kernel.path, _viewed(eqn, kernel))]
        rows = None if len(kernels) > 1 else _rows(eqn, values, kernel, letters[kernel.path])
        if rows is None:
            raise SelectionError(
                f"input_moments() at '{kernel.path}': it reaches '{name}', which is no product over its inputs. Leave "
                "it out of the selector; of layers that scan runs over there are no moments."
            )
        rows = jnp.asarray(rows, jnp.float32)
        new = (rows.shape[0], jnp.sum(rows, 0), jnp.matmul(rows.T, rows, precision="highest"))
        sums[kernel.path] = jax.tree.map(jnp.add, sums[kernel.path], new) if kernel.path in sums else new
        return plain

    names = sorted(own)
    jaxpr = jax.make_jaxpr(lambda *arrays: forward(dict(zip(names, arrays, strict=True))))(*(own[n] for n in names))
    marked = [_Kernel(own[name], name, tuple(range(own[name].ndim))) for name in names]
    interpret(jaxpr, marked, rule=rule, platform=_NEUTRAL)
    for path in names:
        if path not in sums:
            raise SelectionError(f"input_moments() at '{path}': it meets no data. Leave it out of the selector.")
    return sums


def kernel_axes(path: str, leaf: Any) -> str:
    """``i`` or ``o`` per axis of a kernel: inputs, outputs.

    Raises:
      SelectionError: the leaf is no kernel, or one of which inputs and outputs cannot be told apart.

    >>> kernel_axes("attention/query/kernel", np.ones((8, 2, 4)))
    'ioo'
    """
    return _letters(path, leaf, ())


def _closed(jaxpr: Any) -> Any:
    return jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jex.ClosedJaxpr(jaxpr, ())


def _viewed(eqn: Any, kernel: _Kernel) -> tuple[int | None, ...]:
    """The kernel's own axes in what an equation makes of it."""
    name, new = eqn.primitive.name, tuple(eqn.outvars[0].aval.shape)
    if name == "transpose":
        return tuple(kernel.axes[axis] for axis in eqn.params["permutation"])
    wide = lambda shape: [size for size in shape if size > 1]
    if wide(kernel.value.shape) != wide(new):
        raise SelectionError(
            f"input_moments() at '{kernel.path}': '{name}' makes {new} of {tuple(kernel.value.shape)}, which mixes its "
            "axes. Leave it out of the selector."
        )
    kept = iter([axis for axis, size in zip(kernel.axes, kernel.value.shape, strict=True) if size > 1])
    return tuple(next(kept) if size > 1 else None for size in new)


def _rows(eqn: Any, values: list[Any], kernel: _Kernel, letters: str) -> Any:
    """``[rows, in]``: what a product multiplies a kernel by; ``None`` where it does not sum over its inputs."""
    inner = [axis for axis, letter in enumerate(letters) if letter == "i"]
    if eqn.primitive.name == "dot_general":
        place = 0 if isinstance(values[0], _Kernel) else 1
        summed, batch = eqn.params["dimension_numbers"]
        pairs = zip([kernel.axes[axis] for axis in summed[place]], summed[1 - place], strict=True)
        x, own = values[1 - place], {axis: theirs for axis, theirs in pairs if axis is not None}
        size = lambda axis: kernel.value.shape[kernel.axes.index(axis)] if axis in kernel.axes else 1
        missing = [axis for axis in inner if axis not in own and size(axis) > 1]
        if batch[place] or missing or any(axis not in inner for axis in own):
            return None
        order = [own[axis] for axis in inner if axis in own]
        rows = jnp.moveaxis(x, order, range(x.ndim - len(order), x.ndim))
        return rows.reshape(-1, int(np.prod([x.shape[axis] for axis in order])))
    if eqn.primitive.name == "conv_general_dilated" and values[1] is kernel:
        return _patches(eqn.params, values[0], kernel, len(inner))
    return None


def _patches(options: Mapping[str, Any], x: Any, kernel: _Kernel, inner: int) -> Any:
    """The patches of a convolution without groups, in the order of a kernel ``[h, w, in, out]``."""
    numbers = options["dimension_numbers"]
    output, features, *space = numbers.rhs_spec
    natural = [kernel.axes[axis] for axis in (*space, features)]
    wanted = [axis for axis in range(inner) if axis in natural]
    grouped = options["feature_group_count"] != 1 or options["batch_group_count"] != 1
    if grouped or [axis for axis in natural if axis is not None] != wanted or kernel.axes[output] in range(inner):
        return None
    sizes = [kernel.value.shape[axis] for axis in space]
    found = jax.lax.conv_general_dilated_patches(
        x,
        sizes,
        options["window_strides"],
        options["padding"],
        lhs_dilation=options["lhs_dilation"],
        rhs_dilation=options["rhs_dilation"],
        dimension_numbers=numbers,
        precision=jax.lax.Precision.HIGHEST,
    )
    channel = numbers.out_spec[1]
    rows = jnp.moveaxis(found, channel, -1).reshape(-1, kernel.value.shape[features], int(np.prod(sizes)))
    return rows.transpose(0, 2, 1).reshape(rows.shape[0], -1)
