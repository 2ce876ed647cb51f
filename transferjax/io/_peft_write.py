"""Adapter folders that Hugging Face PEFT loads, written from a tuning's weights."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from transferjax._errors import CheckpointError, SelectionError, describe, listing, nearest_hint
from transferjax._report import Report
from transferjax._types import is_hole
from transferjax.io._beside import beside, sync
from transferjax.io._peft import CONFIG, OUTER, WEIGHTS
from transferjax.io._replace import absolute
from transferjax.io._safetensors import write_safetensors
from transferjax.surgery import Move, Plan
from transferjax.tree import flatten

_TRANSPOSED = ("permute", (1, 0))
_CONVOLUTION = ("permute", (2, 3, 1, 0))
_SIDES = ("lora_a", "lora_b", "magnitude")


def write_peft(
    path: str | os.PathLike[str],
    trainable: Any,
    plan: Plan,
    *,
    alpha: float | Mapping[str, float] | None = None,
    rank_stabilised: bool = False,
    base: str | None = None,
    prefix: str = "",
    overwrite: bool = False,
) -> Report:
    """A LoRA or DoRA adapter as a folder that Hugging Face PEFT loads.

    Args:
      path: the folder to write; beside and renamed, so that it never holds a half.
      trainable: of a :func:`transferjax.lora` or :func:`transferjax.dora` tuning, alone or as groups of a chain.
        Leaves that learnt whole are written as ``modules_to_save``.
      plan: the plan by which the model's weights came from torch names.
      alpha: what the tuning was made with, or one per path; ``None``: the rank, as there.
      rank_stabilised: what the tuning was made with.
      base: the name of the base model, for ``base_model_name_or_path``.
      prefix: in front of every module's name, such as ``"bert."`` when the torch model holds the base under it.
      overwrite: whether an existing adapter folder is replaced.

    Returns:
      A ``Report``: path, module, rank and alpha of each adapter.

    Raises:
      CheckpointError: there is no adapter, LoRA and DoRA are mixed, a leaf has no torch name in the plan, an adapted
        leaf is no matrix or convolution there, or the system refuses to write.

    >>> import tempfile, numpy as np, jax, transferjax as tj
    >>> from transferjax import surgery
    >>> params = {"fc": {"kernel": np.ones((3, 2), np.float32)}}
    >>> plan = surgery.plan({"fc.weight": np.ones((2, 3), np.float32)}, params,
    ...                     surgery.rename("fc.weight", "fc/kernel"), surgery.permute("**", (1, 0)))
    >>> trainable, frozen = tj.lora("fc/kernel", rank=1).init(jax.random.key(0), params)
    >>> write_peft(tempfile.mkdtemp() + "/adapter", trainable, plan).rows
    (('fc/kernel', 'fc', 1, 1.0),)
    """
    where = absolute(path, "write_peft", "write write_peft(path, trainable, plan)")
    moves = {move.target: move for move in plan.moves}
    parts, whole = _written(trainable, moves)
    if not parts:
        raise CheckpointError(
            f"write_peft() found no lora_a and lora_b in {describe(trainable)}. Give it the trainable part of a "
            "tj.lora or tj.dora tuning."
        )
    weighted = _is_weighted(parts)
    found = {target: int(sides["lora_a"].shape[-1]) for target, sides in parts.items()}
    alphas = {target: _given_alpha(alpha, target, rank) for target, rank in found.items()}
    arrays: dict[str, np.ndarray] = {}
    modules: dict[str, str] = {}
    for target, sides in parts.items():
        modules[target] = prefix + _module(moves[target])
        arrays |= _torch_sides(OUTER + modules[target], moves[target], sides)
    saved = []
    for target, leaf in whole.items():
        source, array = _torch_leaf(moves[target], leaf, plan)
        arrays[f"{OUTER}{prefix}{source}"] = array
        saved.append(prefix + source.rpartition(".")[0])
    config = _new_config(modules, found, alphas, rank_stabilised, base, sorted(set(saved)))
    config |= {"fan_in_fan_out": _untransposed(moves, parts), "use_dora": weighted}
    _write(where, arrays, config, overwrite)
    rows = [(target, modules[target], found[target], alphas[target]) for target in parts]
    rows += [(target, "trained whole", None, None) for target in whole]
    return Report("PEFT adapter", ("path", "module", "rank", "alpha"), tuple(rows), {"folder": where})


def _written(trainable: Any, moves: Mapping[str, Move]):
    """``{target: {"lora_a", ...}}`` and ``{target: leaf}``, whatever groups the tree has."""
    parts: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    whole: dict[str, Any] = {}
    for path, leaf in flatten(trainable)[0]:
        if is_hole(leaf):
            continue
        owner, _, name = path.rpartition("/")
        side = name in _SIDES and not {path, path.partition("/")[2]} & moves.keys()
        target = owner if side else path
        if target not in moves and target.partition("/")[2] in moves:
            target = target.partition("/")[2]
        if target not in moves:
            raise CheckpointError(
                f"'{path}' has no counterpart in the plan.{nearest_hint(target, list(moves))} "
                "Expected lora_a, lora_b, magnitude or whole leaves of the plan's targets."
            )
        if moves[target].source is None or not isinstance(moves[target].source, str):
            raise CheckpointError(
                f"'{target}' comes from no single source leaf in the plan, so it has no torch name. Leave it out of "
                "trainable, and save it with transferjax.io.save."
            )
        if side:
            parts[target][name] = leaf
        else:
            whole[target] = leaf
    return dict(parts), whole


def _module(move: Move) -> str:
    source = str(move.source)
    if not source.endswith(".weight"):
        raise CheckpointError(
            f"'{move.target}' comes from '{source}'. Expected a module's '.weight', as PEFT adapts modules."
        )
    return source.removesuffix(".weight")


def _given_alpha(alpha: Any, target: str, rank: int) -> float:
    if isinstance(alpha, Mapping):
        if target not in alpha:
            raise SelectionError(f"alpha has no entry for '{target}'.{nearest_hint(target, list(alpha))}")
        return float(alpha[target])
    return float(rank if alpha is None else alpha)


def _is_weighted(parts: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the adapters are DoRA's: all of them, or none."""
    for target, sides in parts.items():
        if not {"lora_a", "lora_b"} <= set(sides):
            raise CheckpointError(
                f"the adapter of '{target}' has only {listing(sorted(sides))}. Expected lora_a and lora_b: give "
                "write_peft the trainable part of a tj.lora or tj.dora tuning."
            )
    with_magnitude = [target for target, sides in parts.items() if "magnitude" in sides]
    without = [target for target in parts if target not in with_magnitude]
    if with_magnitude and without:
        raise CheckpointError(
            f"'{with_magnitude[0]}' has a magnitude (DoRA) and '{without[0]}' has none (LoRA); PEFT has one use_dora "
            "for all. Write them as two folders."
        )
    return bool(with_magnitude)


def _torch_sides(name: str, move: Move, sides: Mapping[str, Any]) -> dict[str, np.ndarray]:
    a, b = (np.asarray(sides[side], np.float32) for side in ("lora_a", "lora_b"))
    ops = tuple(op for op in move.ops if op[0] != "cast")
    length = np.asarray(sides.get("magnitude", ()), np.float32).reshape((1, -1, 1, 1) if a.ndim == 4 else -1)
    magnitude = {f"{name}.lora_magnitude_vector": length} if "magnitude" in sides else {}
    if move.target.rpartition("/")[2] == "embedding":
        return {f"{name}.lora_embedding_A": a.T, f"{name}.lora_embedding_B": b.T} | magnitude
    if a.ndim == 4 and ops == (_CONVOLUTION,):
        turned = {"A": a.transpose(3, 2, 0, 1), "B": b.T[:, :, None, None]}
    elif a.ndim == 2 and ops in ((_TRANSPOSED,), ()):
        turned = {"A": a.T, "B": b.T}
    else:
        raise CheckpointError(
            f"the adapter of '{move.target}' has no form in PEFT: the kernel comes from '{move.source}' by "
            f"{move.how}. Expected a plain matrix or a convolution."
        )
    return {f"{name}.lora_{side}.weight": array for side, array in turned.items()} | magnitude


def _torch_leaf(move: Move, leaf: Any, plan: Plan) -> tuple[str, np.ndarray]:
    back = next(m for m in plan.inverse().moves if move.target in m.sources)
    return back.target, np.asarray(back.run([np.asarray(leaf)]))


def _untransposed(moves: Mapping[str, Move], parts: Mapping[str, Any]) -> bool:
    """Whether the torch weights are ``[in, out]``, as those of GPT-2's Conv1D are."""
    dense = [t for t, sides in parts.items() if sides["lora_a"].ndim == 2 and t.rpartition("/")[2] != "embedding"]
    kinds = {not any(op[0] == "permute" for op in moves[target].ops) for target in dense}
    if len(kinds) > 1:
        raise CheckpointError(
            "some adapted weights are [in, out] in torch and some [out, in]; PEFT has one fan_in_fan_out for all. "
            "Write them as two folders."
        )
    return kinds == {True}


def _new_config(modules, ranks, alphas, stabilised, base, saved) -> dict[str, Any]:
    """The configuration: the commonest rank and alpha, and patterns for the modules that differ."""
    rank = collections.Counter(ranks.values()).most_common(1)[0][0]
    alpha = collections.Counter(alphas.values()).most_common(1)[0][0]
    number = lambda value: int(value) if float(value).is_integer() else value
    return {
        "peft_type": "LORA",
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "revision": None,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": number(alpha),
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "bias": "none",
        "init_lora_weights": True,
        "target_modules": sorted(modules.values()),
        "modules_to_save": saved or None,
        "rank_pattern": {modules[t]: r for t, r in ranks.items() if r != rank},
        "alpha_pattern": {modules[t]: number(a) for t, a in alphas.items() if a != alpha},
        "use_rslora": stabilised,
    }


def _write(where: str, arrays: Mapping[str, np.ndarray], config: Mapping[str, Any], overwrite: bool) -> None:
    if os.path.lexists(where) and not (overwrite and _is_adapter(where)):
        what = "is no PEFT adapter" if overwrite else "exists"
        raise CheckpointError(f"'{where}' {what}, and is left as it is. Choose another path, or overwrite=True.")
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with beside(where) as new:
        os.mkdir(new)
        with open(os.path.join(new, WEIGHTS), "wb") as file:
            reads = {name: (lambda array=array: array) for name, array in contiguous.items()}
            write_safetensors(file, reads, contiguous, lambda: {"format": "pt"})
        with open(os.path.join(new, CONFIG), "w", encoding="utf-8") as file:
            json.dump(config, file, indent=2)
        for name in (WEIGHTS, CONFIG):
            sync(os.path.join(new, name))


def _is_adapter(where: str) -> bool:
    return os.path.isdir(where) and set(os.listdir(where)) <= {CONFIG, WEIGHTS, "README.md"}
