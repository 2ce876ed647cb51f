"""Two networks beside each other, layer by layer: where the second departs from the first."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import numpy as np

from transferjax._errors import SelectionError, TransferError, describe, listing, nearest_hint
from transferjax._report import Report
from transferjax._types import Model
from transferjax.program._compat import bodies
from transferjax.surgery._checks import check_tolerance
from transferjax.surgery._trees import leaves
from transferjax.tree import Selector, as_selector, flatten, natural

OUTPUTS = "(outputs)"
"""What the outputs of a Model are called among its layers."""

COLUMNS = ("layer", "in b", "shape", "largest difference", "relative", "cosine", "result")
AGREES, DEPARTS, SHAPE, ONLY_A, ONLY_B = "agrees", "departs", "another shape", "only in a", "only in b"

_NO_GLOBS = (
    " In pairs each name is one path, not a glob: write each pair out, or one glob where the names are the same."
)

At = Selector | str | Iterable[Any] | Mapping[str, str]
Pairs = list[tuple[str, str]]


def compare(
    model_a: Model | Mapping[str, Any],
    model_b: Model | Mapping[str, Any],
    inputs: Any,
    *,
    at: At = "**",
    inputs_b: Any = None,
    tolerance: float = 1e-4,
) -> Report:
    """What two networks compute, layer by layer, and the first layer at which they part.

    Each Model runs once, in inference mode. The layers come in the order in which the first Model runs them, and
    what lies inside of a module before the module, so that the first departure is its own: a wrong padding, epsilon
    or transpose there, or an input that is not the same. Everything that is captured is held in memory: choose
    fewer layers, or few examples, when the networks are large. The turns of a scanned layer are one array, in which
    what comes first in a turn departs first. Linen's own scan raises that
    outputs cannot leave the transformation unless it carries them: write ``nn.scan(..., variable_axes={"params": 0,
    "intermediates": 0})``, or choose the layers around it by ``at=``, as against an unrolled network. On a GPU or
    TPU compare under ``jax.default_matmul_precision("highest")``.

    Args:
      model_a: the reference: a ``Model``; or what it was seen to compute, ``{name: array}`` (a dict or an open
        ``.npz``), for example from the hooks of a torch module, with the axes of the Model that it is compared with.
      model_b: the network in question, a ``Model`` or a mapping as well.
      inputs: one batch as ``Model.apply`` takes it.
      at: module paths of both: a selector, a glob or a list of them; where the names differ
        ``{path in a: path in b}`` or a list of such pairs. ``"(outputs)"`` stands for what a Model returns.
      inputs_b: the batch of ``model_b`` where it takes another form (other axes, other keywords).
      tolerance: the largest relative difference, ``max |a - b| / max |a|``, at which two layers agree.

    Returns:
      A ``Report`` with the columns layer, in b (the name there, where it is another), shape, largest difference
      ``max |a - b|``, relative, cosine (of both as vectors) and result: agrees, departs, another shape, NaN, only
      in a or only in b. Its metadata hold ``"first departure"``, a layer of a or ``None``: the first that is
      neither equal nor found in only one. A NaN on either side departs; equal infinities are equal.

    Raises:
      SelectionError: ``at`` selects nothing, a name is unknown, or both sides have no layer in common.
      TransferError: a side is neither Model nor mapping, its weights are abstract or what it holds are no numbers.

    >>> import jax.numpy as jnp, transferjax as tj
    >>> from transferjax.interop import mark, pure
    >>> def network(p, x):
    ...     x = mark("stem", x @ p["stem"])
    ...     x = mark("norm", x / jnp.sqrt(jnp.mean(x**2) + p["epsilon"]))
    ...     return mark("head", x @ p["head"])
    >>> weights = {"stem": jnp.ones((2, 2)), "head": jnp.ones((2, 3)), "epsilon": 1e-6}
    >>> report = compare(pure(network, weights), pure(network, {**weights, "epsilon": 1e-1}), jnp.ones((1, 2)))
    >>> report.column("layer"), report.metadata["first departure"]
    (['stem', 'norm', 'head', '(outputs)'], 'norm')
    """
    check_tolerance(tolerance)
    pairs, selectors = _asked(at)
    sides = (model_a, model_b)
    batches = (inputs, inputs if inputs_b is None else inputs_b)
    named = [None, None] if pairs is None else [list(dict.fromkeys(pair[side] for pair in pairs)) for side in (0, 1)]
    program = jax.jit(functools.partial(_forward), static_argnums=(0, 1, 2))  # one for both, where they are one network
    found = [_features(sides[n], batches[n], selectors, named[n], f"model_{'ab'[n]}", program) for n in (0, 1)]
    matched = _matched(found[0], found[1], pairs)
    if not isinstance(model_a, Model) and isinstance(model_b, Model):
        order = {name: number for number, name in enumerate(found[1])}
        matched = sorted(matched, key=lambda pair: order.get(pair[1] or "", len(order)))
    return _report([_layer(found, a, b, tolerance) for a, b in matched], tolerance)


@dataclasses.dataclass(frozen=True)
class _Is:
    """The predicate of one path, whatever characters it has."""

    path: str

    def __call__(self, path: str, leaf: Any) -> bool:
        return path == self.path


def _asked(at: Any) -> tuple[Pairs | None, tuple[Selector, ...]]:
    """The pairs of names that are asked for, or selectors for both sides."""
    if isinstance(at, Mapping):
        at = list(at.items())
    listed: list[Any] = [at] if isinstance(at, (Selector, str)) or not isinstance(at, Iterable) else list(at)
    if not listed:
        raise SelectionError("compare() expects at least one layer in at=: a glob such as 'blocks/*', or pairs.")
    if not all(isinstance(one, (tuple, list)) for one in listed):
        return None, tuple(map(as_selector, listed))
    for pair in listed:
        if len(pair) != 2 or not all(isinstance(name, str) for name in pair):
            raise SelectionError(f"compare() expects pairs (path in a, path in b) of str in at=, got {pair!r}.")
    return [(a, b) for a, b in listed], ()


def _features(
    side: Any, inputs: Any, selectors: tuple[Selector, ...], names: list[str] | None, what: str, program: Any
) -> dict[str, Any]:
    """What is asked for of one side, by name, in the order in which it runs."""
    if isinstance(side, Model):
        if names is not None:
            modules = [name.partition("#")[0] for name in names if not _of_outputs(name)]
            selectors = tuple(Selector(f"'{name}'", _Is(name)) for name in modules)
        try:
            return _run(side, inputs, selectors, what, program)
        except SelectionError as error:
            hint = _NO_GLOBS if any(set(name) & set("*?[{") for name in names or ()) else ""
            raise SelectionError(str(error).replace("capture():", f"compare(): {what}:") + hint) from None
    if not isinstance(side, Mapping):
        raise TransferError(
            f"compare() expects a Model or a mapping {{name: array}} as {what}, got {describe(side)}. "
            "Write tj.interop.nnx(module) or tj.interop.linen(module, variables)."
        )
    if names is None:
        chosen = [name for name in side if any(one(name) for one in selectors)]
        if not chosen:
            raise SelectionError(
                f"compare(): {listing([repr(one) for one in selectors])} matched none of the {len(side)} names of "
                f"{what}: {listing(list(side))}. Where the names differ write at={{name in a: path in b}}."
            )
        return {name: side[name] for name in chosen}
    for name in names:
        if name not in side:
            hint = _NO_GLOBS if set(name) & set("*?[{") else ""
            raise SelectionError(f"compare(): {what} has no '{name}'.{nearest_hint(name, side)}{hint}")
    return {name: side[name] for name in side if name in set(names)}


def _run(model: Model, inputs: Any, selectors: tuple[Selector, ...], what: str, program: Any) -> dict[str, Any]:
    for path, leaf in leaves(model).items():
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TransferError(f"compare(): the weights of {what} are abstract, see '{path}'. Restore them first.")
    arguments = (model.apply, model.capture, selectors, model.params, model.extra, inputs)
    jaxpr = program.trace(*arguments).jaxpr.jaxpr
    arrays = program(*arguments)
    places = dict(zip(arrays, map(_place_in(jaxpr), jaxpr.outvars), strict=True))
    owners = {path.rpartition("/")[0] for path in leaves(model)}

    def turn(name: str) -> tuple[Any, ...]:
        # A module that hands on what another made (a container, dropout at rest) comes behind the one that made it.
        path = name.partition("#")[0]
        return _of_outputs(name), places[name], path not in owners, -path.count("/"), natural(name), name

    return {name: arrays[name] for name in sorted(arrays, key=turn)}


def _forward(apply: Any, capture: Any, selectors: tuple[Selector, ...], params: Any, extra: Any, inputs: Any) -> Any:
    """What is captured, and the outputs, by name."""
    if selectors:
        outputs, _, found = capture(params, extra, inputs, selectors)
    else:
        (outputs, _), found = apply(params, extra, inputs), {}
    returned = {f"{OUTPUTS}/{path}" if path else OUTPUTS: leaf for path, leaf in flatten(outputs)[0]}
    return {**found, **returned}


def _place_in(jaxpr: jex.Jaxpr) -> Any:
    """``variable -> place``: the number of the equation that makes it, then the place within that equation's body."""
    made = {var: (number, index) for number, eqn in enumerate(jaxpr.eqns) for index, var in enumerate(eqn.outvars)}

    def place(var: Any) -> tuple[int, ...]:
        if isinstance(var, jex.Literal) or var not in made:
            return (-1,)
        number, index = made[var]
        eqn = jaxpr.eqns[number]
        inner = [body for body in bodies(eqn) if len(body.outvars) == len(eqn.outvars)]
        return (number, *(_place_in(inner[0])(inner[0].outvars[index]) if len(inner) == 1 else ()))

    return place


def _of_outputs(name: str) -> bool:
    return name == OUTPUTS or name.startswith(f"{OUTPUTS}/")


def _matched(a: Mapping[str, Any], b: Mapping[str, Any], pairs: Pairs | None) -> list[tuple[str | None, str | None]]:
    """Names that belong together, in the order of a; then those of b that are left over."""
    together: list[tuple[str | None, str | None]] = []
    for name in a:
        wanted = [name] if pairs is None else _partners(name, pairs)
        together += [(name, other if other in b else None) for other in wanted]
    if all(None in pair or (pair[0] == pair[1] and _of_outputs(pair[0] or "")) for pair in together):
        raise SelectionError(
            f"compare() found no layer in both: a has {listing(list(a), 3)}; b has {listing(list(b), 3)}. "
            "Where the names differ write at={path in a: path in b}."
        )
    used = {other for _, other in together}
    together += [(None, name) for name in b if name not in used]
    asked = pairs is None and any(map(_of_outputs, a)) and any(map(_of_outputs, b))
    return [pair for pair in together if asked or None not in pair or not _of_outputs(pair[0] or pair[1] or "")]


def _partners(name: str, pairs: Pairs) -> list[str]:
    """The names in b that pairs give to a name of a, its further calls (``#2``) and parts (``/0``) among them."""
    keys = [key for key, _ in pairs if name == key or name.startswith((f"{key}#", f"{key}/"))]
    if not keys:
        return [name]
    key = max(keys, key=len)
    return [other + name[len(key) :] for one, other in pairs if one == key]


class _Layer(NamedTuple):
    """One row: names in a and in b, and what the two have to do with each other."""

    a: str | None
    b: str | None
    shape: str
    largest: float | None
    relative: float | None
    cosine: float | None
    result: str


def _layer(found: list[dict[str, Any]], a: str | None, b: str | None, tolerance: float) -> _Layer:
    if a is None or b is None:
        value = found[0][a] if a is not None else found[1][b or ""]
        return _Layer(a, b, str(np.shape(value)), None, None, None, ONLY_A if b is None else ONLY_B)
    one, two = _wide(found[0][a], f"'{a}' of model_a"), _wide(found[1][b], f"'{b}' of model_b")
    if one.shape != two.shape:
        return _Layer(a, b, f"{one.shape} and {two.shape}", None, None, None, SHAPE)
    largest, relative = _difference(one, two)
    with_nan = " and ".join(side for side, array in (("a", one), ("b", two)) if np.isnan(array).any())
    result = f"NaN in {with_nan}" if with_nan else DEPARTS if relative > tolerance else AGREES
    return _Layer(a, b, str(one.shape), largest, relative, _cosine(one, two), result)


def _wide(value: Any, what: str) -> np.ndarray:
    try:
        array = np.asarray(value)
        return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)
    except (TypeError, ValueError):
        raise TransferError(f"compare(): {what} is {describe(value)}; expected an array of numbers.") from None


def _difference(one: np.ndarray, two: np.ndarray) -> tuple[float, float]:
    """``max |a - b|``, and the same over the largest finite ``|a|``."""
    with np.errstate(invalid="ignore"):
        apart = np.where(one == two, 0.0, np.abs(one - two))
    largest = float(np.max(apart, initial=0.0))
    scale = float(np.max(np.abs(one[np.isfinite(one)]), initial=0.0))
    if not largest:
        return 0.0, 0.0
    return largest, largest / scale if scale else float("nan") if np.isnan(largest) else float("inf")


def _cosine(one: np.ndarray, two: np.ndarray) -> float | None:
    """The cosine between both as vectors; ``None`` where one is zero or not finite."""
    with np.errstate(all="ignore"):
        lengths = np.linalg.norm(one.ravel()) * np.linalg.norm(two.ravel())
        product = float(np.real(np.vdot(one.ravel(), two.ravel())))
    return product / float(lengths) if lengths and np.isfinite(lengths) else None


def _report(layers: list[_Layer], tolerance: float) -> Report:
    first = next((one for one in layers if one.result not in (AGREES, ONLY_A, ONLY_B)), None)
    compared = sum(one.result not in (ONLY_A, ONLY_B) for one in layers)
    told = f"{compared:,} layers agree" if first is None else f"{compared:,} layers, the first departure is '{first.a}'"
    sizes = [one.relative for one in layers if one.relative is not None]
    rows = [
        (one.b if one.a is None else one.a, one.b if one.a is not None and one.b != one.a else None, *one[2:])
        for one in layers
    ]
    metadata = {
        "first departure": None if first is None else first.a,
        "largest relative difference": float(np.max(sizes)) if sizes else None,
        "tolerance": tolerance,
        ONLY_A: listing([str(one.a) for one in layers if one.b is None]) or None,
        ONLY_B: listing([str(one.b) for one in layers if one.a is None]) or None,
    }
    return Report(f"Compare: {told}", COLUMNS, tuple(rows), metadata)
