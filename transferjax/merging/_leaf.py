"""Leaf: the arrays of several trees at one path, computed with a few elements at a time."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from transferjax._errors import DataError

CHUNK = 1 << 17
"""Elements computed with at a time, so that what is made on the way stays in cache."""
STEP = 1 << 19
"""The same of a compiled formula, which makes nothing on the way."""
ALONE = 1 << 19
"""Leaves of fewer elements are not worth a second thread."""
LARGE = 1 << 22
"""Leaves of fewer elements are not worth a compilation."""


# New memory costs the kernel as much time as some formulas take; who makes many results can give what was used before.
_PLACE: ContextVar[Callable[[int], np.ndarray]] = ContextVar("place", default=lambda size: np.empty(size, np.uint8))


@contextlib.contextmanager
def results_from(place: Callable[[int], np.ndarray]) -> Iterator[None]:
    """Lets results of the body lie in memory that ``place`` gives, a number of bytes each."""
    token = _PLACE.set(place)
    try:
        yield
    finally:
        _PLACE.reset(token)


def is_traced(*values: Any) -> bool:
    """Whether anything in these trees is a value that a transformation of JAX traces."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values))


class Leaf:
    """The arrays of several trees at one path; the first says what the result looks like.

    Numpy arrays are computed with in float32 (float64 stays), ``CHUNK`` elements at a time and by all cores: nothing
    of the size of a leaf is made but the result. For large leaves a method may have a compiled formula, see ``map``.
    What is traced is computed with as a whole, by the same formulas.

    Attributes:
      path: of the leaf.
      names: what errors call the trees.
      shape: of the result.
      dtype: of the result.
      work: float32 or float64.
      size: the number of elements.
      traced: whether something in the trees, or a coefficient, is traced.
      xp: ``numpy``, or ``jax.numpy`` of what is traced.
    """

    def __init__(self, path: str, arrays: Mapping[str, Any], traced: bool):
        first = next(iter(arrays.values()))
        self.path, self.names = path, tuple(arrays)
        # JAX has no float64 unless it was enabled, and says so where it is asked for.
        self.shape = tuple(first.shape)
        self.dtype = np.dtype(jax.dtypes.canonicalize_dtype(first.dtype) if traced else first.dtype)
        self.work = np.dtype(np.float64 if self.dtype == np.float64 else np.float32)
        self.size = int(np.prod(self.shape))
        self.traced, self.xp = traced, _namespace(traced)
        self._flat = [self.xp.asarray(array).reshape(-1) for array in arrays.values()]

    def beside(self, arrays: Mapping[str, Any]) -> Leaf:
        """The same leaf with further arrays behind its own; they may be of other dtypes."""
        out = copy.copy(self)
        out.names = (*self.names, *arrays)
        out._flat = [*self._flat, *(self.xp.asarray(array).reshape(-1) for array in arrays.values())]
        return out

    def __len__(self) -> int:
        return len(self._flat)

    def spans(self, step: int | None = None) -> list[slice]:
        """The chunks of the flat leaf, ``CHUNK`` elements or ``step``."""
        step = step or CHUNK
        return [slice(start, min(start + step, self.size)) for start in range(0, self.size, step)]

    def chunks(self, at: Any, *numbers: int) -> list[Any]:
        """Elements of every array, or of some, in the dtype of the computation; views where they have it already."""
        chosen = [self._flat[number] for number in numbers] if numbers else self._flat
        return [flat[at].astype(self.work, copy=False) for flat in chosen]

    def scalars(self, values: Any) -> Any:
        """Coefficients in the dtype of the computation, which they do not widen."""
        return self.xp.asarray(values, self.work)

    def map(
        self,
        formula: Callable[..., Any],
        check: Callable[..., None] | None = None,
        program: Callable[..., Any] | None = None,
    ) -> Any:
        """The result, element by element.

        Args:
          formula: ``(at, *chunks) -> chunk``, where ``at`` is the slice of the flat leaf; it changes no chunk.
          check: called with the chunks of numpy arrays first; raises.
          program: the formula compiled, for large leaves of numpy arrays: ``(at, *chunks) -> (chunk, seen, made)``,
            with the largest :func:`magnitude` in the chunks and in the result. Without ``check``.

        Raises:
          DataError: NaN or infinity in an array, or a result beyond the dtype.
        """
        if self.traced:
            whole = slice(0, self.size)
            return formula(whole, *self.chunks(whole)).astype(self.dtype).reshape(self.shape)
        out = _PLACE.get()(self.size * self.dtype.itemsize).view(self.dtype)
        largest, finite = float(jnp.finfo(self.dtype).max), float(np.finfo(self.work).max)
        cpu = _cpu() if program is not None and self.size >= LARGE and self.work == np.float32 else None
        step = CHUNK if cpu is None else STEP

        def fill(at: slice) -> None:
            chunks = self.chunks(at)
            if program is not None and cpu is not None and at.stop - at.start == step:  # one length, one compilation
                with _as_numpy(cpu):
                    result, seen, made = program(at, *chunks)
                    if float(seen) <= finite and float(made) <= largest:
                        out[at] = result
                        return
            for name, chunk in zip(self.names, chunks):
                if not _within(chunk, finite):
                    raise DataError(
                        f"'{self.path}' has NaN or infinity in {name}. Expected finite numbers: leave that tree out, "
                        "or look at how it was trained."
                    )
            if check is not None:
                check(*chunks)
            result = formula(at, *chunks)
            if not _within(result, largest):
                raise DataError(
                    f"'{self.path}' merges to numbers beyond {self.dtype}. Expected smaller coefficients, or wider "
                    "leaves: cast the trees to float32."
                )
            out[at] = result

        self.each(fill, step)
        return out.reshape(self.shape)

    def total(self, terms: Callable[..., Any]) -> Any:
        """A sum over all elements.

        Args:
          terms: ``(at, *chunks) -> array``, the sum over a chunk.

        Returns:
          An array like that of ``terms``: float64 of numpy arrays.
        """
        if self.traced:
            whole = slice(0, self.size)
            return terms(whole, *self.chunks(whole))
        return sum(self.each(lambda at: np.asarray(terms(at, *self.chunks(at)), np.float64)), start=np.float64(0))

    def gram(self, rows: Callable[..., list[Any]]) -> Any:
        """The inner products ``[n, n]`` of ``n`` vectors.

        Args:
          rows: ``(*chunks) -> n chunks``, the same elements of every vector.
        """
        if self.traced:
            matrix = jnp.stack(rows(*self.chunks(slice(0, self.size))))
            return jnp.matmul(matrix, matrix.T, precision="highest")

        def products(at: slice, *chunks: Any) -> np.ndarray:
            matrix = np.stack(rows(*chunks)).astype(np.float64)
            return matrix @ matrix.T

        count = len(rows(*self.chunks(slice(0, 0))))
        return np.zeros((count, count)) + self.total(products)

    def each(self, function: Callable[[slice], Any], step: int | None = None) -> list[Any]:
        """``function`` of every chunk's slice, in order."""

        def quietly(at: slice) -> Any:  # what is not finite is told by an error, not by numpy's warning
            with np.errstate(all="ignore"):
                return function(at)

        spans, found, failed = self.spans(step), {}, {}
        if self.size < ALONE:
            return list(map(quietly, spans))
        waiting = iter(enumerate(spans))

        def work(_: int) -> None:
            """As many chunks as it gets to: a task for each would wake the waiting thread as often."""
            for number, at in waiting:
                try:
                    found[number] = quietly(at)
                except Exception as error:
                    failed[number] = error
                    return

        workers = os.cpu_count() or 1
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work, range(workers)))
        if failed:
            raise failed[min(failed)]
        return [found[number] for number in range(len(spans))]


def _namespace(traced: bool) -> Any:
    return jnp if traced else np


def magnitude(*arrays: Any) -> Any:
    """The largest magnitude in arrays of float32, in a compiled formula; of NaN too, which no maximum of floats keeps.

    Without the sign, bits of floats order as the numbers do, and a maximum of integers takes the least time.
    """
    bits = [jax.lax.bitcast_convert_type(array, jnp.int32) & 0x7FFFFFFF for array in arrays]
    return jax.lax.bitcast_convert_type(functools.reduce(jnp.maximum, bits).max(), jnp.float32)


@functools.cache
def _cpu() -> Any:
    """Where formulas of numpy arrays are compiled for, whatever JAX's default is; ``None`` where JAX has no CPU."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


@contextlib.contextmanager
def _as_numpy(cpu: Any) -> Iterator[None]:
    """JAX as if nothing was configured: numpy minds none of it. Threads have each their own."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.default_device(cpu))
        stack.enter_context(jax.transfer_guard("allow"))
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.debug_nans(False))
        stack.enter_context(jax.debug_infs(False))
        yield


def _within(chunk: np.ndarray, largest: float) -> bool:
    """Whether all elements lie within ``[-largest, largest]``: no NaN does."""
    return bool(-largest <= chunk.min() and chunk.max() <= largest)
