"""leafwise: a merge of opened checkpoints, each leaf computed when it is read."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from transferjax._errors import CheckpointError, DataError, describe, listing, nearest_hint
from transferjax.merging._average import greedy_soup
from transferjax.merging._leaf import ALONE, results_from
from transferjax.merging._permutations import apply_permutations
from transferjax.merging._reading import Memory, Pool, Reading, specs
from transferjax.merging._rebasin import match_activations, rebasin
from transferjax.merging._search import search
from transferjax.merging._trees import check_alike


def leafwise(method: Callable[..., Any], *arguments: Any, **options: Any) -> Merged:
    """Merges opened checkpoints without holding more than one leaf of each, and a second one while it is read.

    The method is called at each access, with trees that have this one leaf; so the result is what it makes of whole
    trees, bit for bit. ``transferjax.io.transplant`` writes it, leaf by leaf, and neither sources nor result are ever
    in memory as a whole; of every checkpoint the next leaf is read while this one is merged.

    Args:
      method: a function of this package that works leaf by leaf (not ``greedy_soup`` or ``rebasin``), or one of your
        own: ``(*arguments, **options) -> tree``, where trees and result are ``{path: array}`` of a single path. What
        it is given is valid during the call: large leaves are read into the same memory again. Copy what you keep, by
        ``np.array`` (``jax.device_put`` may share it).
      *arguments: as the method takes them, with checkpoints from ``transferjax.io.open`` (or ``{path: array}``) for
        trees: ``leafwise(ties, base, [a, b], density=0.3)``.
      **options: as the method takes them. Lists of mappings are read at each path too.

    Returns:
      A :class:`Merged`: a read-only mapping from path to array that has the shapes of the first checkpoint.

    Raises:
      DataError: there is no checkpoint, they are not alike, or the method evaluates whole models.

    >>> import tempfile, numpy as np, transferjax as tj
    >>> folder = tempfile.mkdtemp()
    >>> for name, value in (("base", 0.0), ("a", 1.0), ("b", 3.0)):
    ...     _ = tj.io.save(f"{folder}/{name}.npz", {"head": {"bias": np.full(2, value, np.float32)}})
    >>> base, a, b = (tj.io.open(f"{folder}/{name}.npz") for name in ("base", "a", "b"))
    >>> merge = leafwise(tj.merging.task_arithmetic, base, [a, b], scale=0.5)
    >>> merge["head/bias"]
    array([2., 2.], dtype=float32)
    >>> plan = tj.surgery.plan(merge.shapes, dict(merge.shapes))
    >>> _ = tj.io.transplant(merge, plan, f"{folder}/merged.safetensors")
    >>> tj.io.load(f"{folder}/merged.safetensors")
    {'head': {'bias': array([2., 2.], dtype=float32)}}
    """
    if method in (greedy_soup, search, rebasin, apply_permutations, match_activations):
        raise DataError(f"{method.__name__}() looks at whole models, so it cannot merge leaf by leaf. Load them.")
    bound = inspect.signature(method).bind(*arguments, **options)
    groups = {name: _group(value) for name, value in bound.arguments.items() if _group(value)}
    if not groups:
        raise DataError("leafwise() got no checkpoint. Expected some of transferjax.io.open(path) among its arguments.")
    _check(groups, {name: value for name, value in bound.arguments.items() if isinstance(value, Mapping)})
    return Merged(method, bound)


def _group(argument: Any) -> list[Any]:
    """The checkpoints that an argument consists of."""
    several = argument if isinstance(argument, list | tuple) else [argument]
    return list(several) if several and all(isinstance(one, Mapping) for one in several) else []


def _check(groups: Mapping[str, list[Any]], single: Mapping[str, Any]) -> None:
    """Models and their base must be alike; what else is given has no further names."""
    alike = {name: specs(one) for name, one in single.items()}
    lists = [group for name, group in groups.items() if name not in single]
    for group in lists[:1]:
        alike.update({f"model {number}": specs(one) for number, one in enumerate(group)})
    check_alike(alike)
    first = next(iter(alike))
    for group in lists[1:]:
        for path in (path for one in group for path in specs(one)):
            if path not in alike[first]:
                hint = nearest_hint(path, alike[first])
                raise DataError(f"'{path}' is no leaf of {first}, and something was given for it.{hint}")


class Merged(Mapping[str, np.ndarray]):
    """A merge of checkpoints that is computed when it is read; made by :func:`leafwise`.

    Each access reads one leaf of every checkpoint and merges them. No array is kept, but the memory that large leaves
    were read into is, for the next ones: that of the largest leaf of every checkpoint, and twice as much while one is
    read ahead; and that of up to two results which nothing refers to any more.

    Attributes:
      format: ``"merged"``.
      metadata: the method's name, and its other arguments as text.
      shapes: ``{path: jax.ShapeDtypeStruct}`` as in the first checkpoint.
      kinds: which leaves stand for no arrays, as in the first checkpoint.

    >>> import numpy as np
    >>> from transferjax.merging import soup
    >>> merge = leafwise(soup, [{"bias": np.zeros(2)}, {"bias": np.ones(2)}])
    >>> list(merge), merge.read("bias", 0)
    (['bias'], array(0.5))
    """

    format = "merged"

    def __init__(self, method: Callable[..., Any], bound: inspect.BoundArguments):
        self._method, self._bound = method, bound
        self._sources = list({id(one): one for value in bound.arguments.values() for one in _group(value)}.values())
        self._spare: list[Memory] = []
        self._results = Pool()
        self._ahead: deque[Reading] = deque(maxlen=2)  # what is read next, and what comes after it
        first = self._sources[0]
        self.kinds: Mapping[str, str] = getattr(first, "kinds", {})
        self.shapes: Mapping[str, jax.ShapeDtypeStruct] = {
            path: jax.ShapeDtypeStruct(tuple(spec.shape), spec.dtype) for path, spec in specs(first).items()
        }
        others = {name: str(value) for name, value in bound.arguments.items() if not _group(value)}
        self.metadata: Mapping[str, Any] = {"method": _name(method), **others}

    def __getitem__(self, path: str) -> Any:
        return self.read(path)

    def read(self, path: str, index: Any = None) -> Any:
        """One merged leaf, or a part of it; all of the leaf is computed.

        Raises:
          CheckpointError: there is no such path, or a source is damaged.
          DataError: the leaf cannot be merged, or the method returns no such leaf.
        """
        self._check(path)
        if self._small(path):
            found = {id(one): {path: one[path]} if path in specs(one) else {} for one in self._sources}
            memory, read = {}, []
        else:
            reading = self._begun(path)
            found, memory = reading.result(), reading.memory
            read = [tree[path] for key, tree in found.items() if key in memory and tree]

        def swapped(value: Any) -> Any:
            if isinstance(value, Mapping):
                return found[id(value)]
            return [found[id(one)] for one in value] if _group(value) else value

        bound = {name: swapped(value) for name, value in self._bound.arguments.items()}
        call = inspect.BoundArguments(self._bound.signature, bound)  # type: ignore[arg-type]
        with contextlib.nullcontext() if self._small(path) else results_from(self._results):
            made = self._method(*call.args, **call.kwargs)
        out = _own(_result(self._method, path, made, self.shapes[path]), read)
        if memory and not self._spare:
            self._spare.append(memory)
        return out if index is None else np.asarray(out[index])

    def ahead(self, path: str) -> None:
        """Begins to read a leaf of every checkpoint in the background, for a ``read`` to come.

        ``transferjax.io.transplant`` says so which leaf comes next. At most two leaves wait; a third one takes the
        place of the first. A small leaf is read when it is asked for.

        Args:
          path: of the leaf. What is wrong with it in a source is told by ``read``.

        Raises:
          CheckpointError: there is no such path.

        >>> import numpy as np
        >>> from transferjax.merging import soup
        >>> merge = leafwise(soup, [{"bias": np.zeros(2)}, {"bias": np.ones(2)}])
        >>> merge.ahead("bias")
        >>> merge.read("bias")
        array([0.5, 0.5])
        """
        self._check(path)
        if not self._small(path) and all(one.path != path for one in tuple(self._ahead)):
            self._ahead.append(Reading(path, self._sources, self._memory()))

    def _check(self, path: str) -> None:
        if path not in self.shapes:
            raise CheckpointError(f"the merge has no array '{path}'.{nearest_hint(str(path), self.shapes)}")

    def _small(self, path: str) -> bool:
        return math.prod(self.shapes[path].shape) < ALONE

    def _begun(self, path: str) -> Reading:
        """The reading of a leaf: one that was asked for, or a new one."""
        for one in tuple(self._ahead):
            if one.path == path:
                try:
                    self._ahead.remove(one)
                except ValueError:  # another thread has taken it
                    continue
                return one
        return Reading(path, self._sources, self._memory())

    def _memory(self) -> Memory:
        """Memory to read into, used before if there is some: a thread that reads at the same time takes its own."""
        try:
            return self._spare.pop()
        except IndexError:
            return {}

    def sliceable(self, path: str) -> bool:
        """Whether a part of a leaf costs less than the leaf: never."""
        return False

    @property
    def verified(self) -> str:
        """``"verified"`` if all sources are."""
        states = {getattr(one, "verified", "unverified") for one in self._sources}
        return "verified" if states == {"verified"} else "unverified"

    def fingerprint(self) -> str:
        """The identity of what is merged and how: 64 hexadecimal digits, of the sources' own fingerprints."""
        facts = [_name(self._method), *((name, _identity(value)) for name, value in self._bound.arguments.items())]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.shapes)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __contains__(self, path: object) -> bool:
        return path in self.shapes

    def __eq__(self, other: object) -> bool:  # a mapping's own would compute every array of both
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"Merged({self.metadata['method']}, {len(self._sources)} checkpoints, {len(self)} arrays)"


def _own(result: Any, read: list[np.ndarray]) -> Any:
    """The result, outside of the memory of what was read, where the next leaf will be."""
    if not read:
        return result
    array = np.asarray(result)  # waits for what JAX may still compute from it
    return array.copy() if any(np.may_share_memory(array, one) for one in read) else array


def _result(method: Any, path: str, found: Any, spec: jax.ShapeDtypeStruct) -> Any:
    """The leaf that a method returned, if it is what the checkpoint will say that it is."""
    if not isinstance(found, Mapping) or path not in found:
        got = f"a dict of {listing([*map(str, found)])}" if isinstance(found, Mapping) else describe(found)
        raise DataError(f"{_name(method)}() returned {got} for the tree of '{path}'. Expected {{'{path}': array}}.")
    if tuple(np.shape(found[path])) != spec.shape or getattr(found[path], "dtype", None) != spec.dtype:
        raise DataError(
            f"{_name(method)}() made {describe(found[path])} of '{path}'; expected {describe(spec)}, as in the first "
            "checkpoint. Cast and shape the result."
        )
    return found[path]


def _name(method: Any) -> str:
    return getattr(method, "__name__", None) or repr(method)


def _identity(value: Any) -> Any:
    """What tells an argument from another, as JSON."""
    if isinstance(value, list | tuple):
        return [_identity(one) for one in value]
    if hasattr(value, "fingerprint"):
        return value.fingerprint()
    if isinstance(value, Mapping):
        return {path: _identity(value[path]) for path in sorted(value)}
    if hasattr(value, "dtype"):
        key = jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(value) if key else value)
        return [str(value.dtype), list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]
    return repr(value)
