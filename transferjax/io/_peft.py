"""Adapter folders of Hugging Face PEFT, read into a tuning and written from one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transferjax._errors import CheckpointError, describe, listing, nearest_hint
from transferjax._report import Report
from transferjax._types import Model, Tuning
from transferjax.io._open import open as open_checkpoint
from transferjax.io._replace import absolute
from transferjax.io._safetensors import parse_json
from transferjax.surgery import Move, Plan
from transferjax.tree import Selector, flatten, paths
from transferjax.tuning import chain, dora, lora, train

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OUTER = "base_model.model."
_REFUSED = (
    *("use_qalora", "use_bdlora", "lora_bias", "layer_replication", "trainable_token_indices"),
    *("target_parameters", "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config"),
)
"""Options that change what an adapter computes."""
_PART = re.compile(r"^(?P<module>.+?)\.lora_(embedding_)?(?P<side>[AB]|magnitude_vector)(\.default)?(\.weight)?$")
_SIDES = {"A": "lora_a", "B": "lora_b", "magnitude_vector": "magnitude"}


class Adapter(NamedTuple):
    """A PEFT adapter beside the model that it adapts.

    Attributes:
      tuning: what learns when the adapter is trained on.
      trainable: the adapter's weights.
      frozen: the model's own; ``tuning.merge(trainable, frozen)`` are parameters for ``model.apply``.
      report: one row per leaf of the adapter.
    """

    tuning: Tuning
    trainable: Any
    frozen: Any
    report: Report


def read_peft(path: str | os.PathLike[str], model: Model, plan: Plan) -> Adapter:
    """A LoRA or DoRA adapter folder as a tuning of a model.

    Args:
      path: the folder with ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``).
      model: the model that the adapter is for, its weights in place.
      plan: the plan by which the model's weights came from torch names: it says which kernel a module's name means.
        A prefix that only one of both has (``bert.encoder`` for ``encoder``) is no obstacle.

    Returns:
      An :class:`Adapter`. Modules that were trained and saved whole (``modules_to_save``) are a group of their own;
      the tuning is then ``chain(adapter=..., whole=...)``.

    Raises:
      CheckpointError: the folder is none of PEFT's, is of another method than LoRA, uses an option that is not
        supported here, has a module that the plan does not know, or arrays that do not fit the kernel.

    Source: the format of Hugging Face PEFT.

    >>> import tempfile, numpy as np, jax, transferjax as tj
    >>> from transferjax import surgery
    >>> params = {"fc": {"kernel": np.ones((3, 2), np.float32)}}
    >>> model = tj.interop.pure(lambda params, x: x @ params["fc"]["kernel"], params)
    >>> plan = surgery.plan({"fc.weight": np.ones((2, 3), np.float32)}, model,
    ...                     surgery.rename("fc.weight", "fc/kernel"), surgery.permute("**", (1, 0)))
    >>> trainable, frozen = tj.lora("fc/kernel", rank=1).init(jax.random.key(0), params)
    >>> folder = tempfile.mkdtemp() + "/adapter"
    >>> _ = tj.io.write_peft(folder, trainable, plan)
    >>> read_peft(folder, model, plan).report.rows
    (('fc/kernel', 'fc', 1, 1.0),)
    """
    where = absolute(path, "read_peft", "write read_peft(path, model, plan)")
    config = _config(where)
    weights = _weights(where)
    flat = paths(model.params)
    weighted = bool(config.get("use_dora"))
    parts, whole = _sorted(where, weights, plan, flat, weighted)
    ranks = {path: sides["lora_a"].shape[-1] for path, (_, sides) in parts.items()}
    alphas = {path: _alpha(config, module, ranks[path]) for path, (module, _) in parts.items()}
    stabilised = bool(config.get("use_rslora"))
    tuning = _tuning(dora if weighted else lora, ranks, alphas, stabilised, whole)
    trainable, frozen = tuning.init(jax.random.key(0), model.params)
    values = {f"{path}/{side}": array for path, (_, sides) in parts.items() for side, array in sides.items()}
    filled = _filled(where, trainable, {**values, **whole}, ("adapter/", "whole/") if whole else ("",))
    rows = [(path, module, ranks[path], alphas[path]) for path, (module, _) in parts.items()]
    rows += [(path, "trained whole", None, None) for path in whole]
    facts = {
        "folder": where,
        "base": config.get("base_model_name_or_path"),
        "rank stabilised": stabilised,
        "DoRA": weighted,
    }
    report = Report("PEFT adapter", ("path", "module", "rank", "alpha"), tuple(rows), facts)
    return Adapter(tuning, filled, frozen, report)


def _filled(where: str, trainable: Any, values: Mapping[str, np.ndarray], prefixes: tuple[str, ...]) -> Any:
    """The fresh weights of a tuning replaced by the folder's."""
    named, treedef = flatten(trainable)
    leaves = []
    for name, leaf in named:
        bare = next(name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix))
        if values[bare].shape != leaf.shape:
            raise CheckpointError(
                f"'{where}': '{bare}' is {describe(values[bare])}; the model expects {describe(leaf)}. "
                "Is the adapter for another size of the model?"
            )
        leaves.append(jnp.asarray(values[bare], leaf.dtype))
    return jax.tree.unflatten(treedef, leaves)


def _config(where: str) -> dict[str, Any]:
    file = os.path.join(where, CONFIG)
    try:
        with open(file, "rb") as stream:
            config = parse_json(stream.read(), f"'{file}'")
    except OSError as error:
        raise CheckpointError(
            f"'{where}' is no PEFT adapter: cannot read {CONFIG} ({error.strerror}). Expected a folder with "
            f"{CONFIG} and {WEIGHTS}."
        ) from None
    method = config.get("peft_type") if isinstance(config, dict) else None
    if method != "LORA":
        raise CheckpointError(f"'{file}' has peft_type {method!r}. Expected 'LORA', the only one that is read here.")
    for name in _REFUSED:
        if config.get(name):
            raise CheckpointError(f"'{file}' uses '{name}', which is not read here. Merge the adapter in PEFT instead.")
    if config.get("bias", "none") != "none":
        raise CheckpointError(
            f"'{file}' has bias {config['bias']!r}: biases were trained too. Expected 'none': merge it in PEFT instead."
        )
    return config


def _weights(where: str) -> dict[str, np.ndarray]:
    for name in (WEIGHTS, "adapter_model.bin"):
        file = os.path.join(where, name)
        if os.path.exists(file):
            return dict(open_checkpoint(file).items())
    raise CheckpointError(f"'{where}' has {CONFIG} but no {WEIGHTS}. Expected both: copy the whole folder.")


def _sorted(where: str, weights: Mapping[str, np.ndarray], plan: Plan, flat: Mapping[str, Any], weighted: bool):
    """``{path: (module, {"lora_a": array, ...})}`` of the adapters, and ``{path: array}`` of whole leaves."""
    by_source = {move.source: move for move in plan.moves if isinstance(move.source, str) and move.target in flat}
    parts: dict[str, tuple[str, dict[str, np.ndarray]]] = {}
    whole: dict[str, np.ndarray] = {}
    for name, array in weights.items():
        bare = name.removeprefix(OUTER)
        match = _PART.match(bare)
        if match is None:
            if ".lora_" in bare:
                raise CheckpointError(f"'{where}' has '{name}', an array of LoRA that is not read here.")
            move = _find(where, bare.replace(".modules_to_save.default", ""), by_source)
            whole[move.target] = np.asarray(move.run([array]))
            continue
        move = _find(where, f"{match['module']}.weight", by_source)
        sides = parts.setdefault(move.target, (match["module"], {}))[1]
        side = _SIDES[match["side"]]
        sides[side] = array.reshape(-1) if side == "magnitude" else _flax_side(where, name, array)
    wanted = {"lora_a", "lora_b", "magnitude"} if weighted else {"lora_a", "lora_b"}
    for module, sides in parts.values():
        if set(sides) != wanted:
            also = " and lora_magnitude_vector, as use_dora says" if weighted else ", as use_dora is not set"
            raise CheckpointError(
                f"'{where}' has {listing(sorted(sides))} as the adapter of '{module}'. Expected lora_A "
                f"and lora_B{also}."
            )
    if not parts:
        raise CheckpointError(f"'{where}' holds no lora_A and lora_B: it has {listing(sorted(weights), 3)}.")
    return parts, whole


def _find(where: str, name: str, by_source: Mapping[str, Move]) -> Move:
    """The move whose source is ``name``, but for a prefix that one of both lacks."""
    if name in by_source:
        return by_source[name]
    near = [s for s in by_source if name.endswith(f".{s}") or s.endswith(f".{name}")]
    if len(near) != 1:
        hint = f" It could be {listing(near, 3)}." if near else nearest_hint(name, list(by_source))
        raise CheckpointError(
            f"'{where}' adapts '{name}', which names {len(near) or 'no'} leaves of the plan's source.{hint} "
            "Is it an adapter for another architecture?"
        )
    return by_source[near[0]]


def _flax_side(where: str, name: str, array: np.ndarray) -> np.ndarray:
    """``[r, in]`` or ``[r, in, kh, kw]`` as lora_a; ``[out, r]`` or ``[out, r, 1, 1]`` as lora_b."""
    if array.ndim == 2:
        return array.T
    if array.ndim == 4:
        turned = array.transpose(2, 3, 1, 0)
        return turned[0, 0] if ".lora_B" in name and turned.shape[:2] == (1, 1) else turned
    raise CheckpointError(f"'{where}': '{name}' is {describe(array)}. Expected two axes, or four of a convolution.")


def _alpha(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The alpha of one module: that of a pattern that its name ends with, or the common one."""
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return float(config.get("lora_alpha", rank))


def _tuning(
    method: Callable[..., Tuning],
    ranks: dict[str, int],
    alphas: dict[str, float],
    stabilised: bool,
    whole: Mapping[str, Any],
) -> Tuning:
    adapter = method(_exactly(ranks), _by_value(ranks), alpha=_by_value(alphas), rank_stabilised=stabilised)
    return chain(adapter=adapter, whole=train(_exactly(whole))) if whole else adapter


def _by_value(values: Mapping[str, Any]) -> Any:
    """The one value of all paths, or each value by a glob of its paths."""
    distinct = sorted(set(values.values()))
    if len(distinct) == 1:
        return distinct[0]
    return {f"{{{','.join(p for p, own in values.items() if own == value)}}}": value for value in distinct}


def _exactly(names: Mapping[str, Any]) -> Selector:
    chosen = frozenset(names)
    return Selector(f"{len(chosen)} leaves of a PEFT adapter", lambda path, leaf: path in chosen)
