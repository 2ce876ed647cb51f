"""Where the leaves of an EfficientNet-Lite lie in the torch files."""

from __future__ import annotations

import re
from typing import Any

_NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
_BLOCK_NORM = {"_bn0": "expand_bn", "_bn1": "depthwise_bn", "_bn2": "project_bn"}
_OUTER_NORM = {"_bn0": "stem/bn", "_bn1": "head/bn"}


def rules(surgery: Any, num_classes: int) -> tuple[Any, ...]:
    """Rules for the file of efficientnet_lite_pytorch; the head follows the number of outputs."""
    head = {1000: (), 0: (surgery.waive("_fc.*"),)}.get(num_classes, (surgery.fresh("head/fc/**"),))
    fc = () if num_classes == 0 else (surgery.rename(r"_fc\.(weight|bias)", _dense),)
    return (
        surgery.rename(r"_conv_(stem|head)\.weight", r"\1/conv/kernel"),
        surgery.rename(r"_blocks\.(\d+)\._(expand|depthwise|project)_conv\.weight", r"blocks/\1/\2/kernel"),
        surgery.rename(r"_blocks\.(\d+)\.(_bn[012])\.(weight|bias|running_mean|running_var)", _block_norm),
        surgery.rename(r"(_bn[01])\.(weight|bias|running_mean|running_var)", _outer_norm),
        *fc,
        surgery.torch_layout("**/kernel"),
        surgery.waive("*.num_batches_tracked"),
        *head,
    )


def _block_norm(found: re.Match[str]) -> str:
    return f"blocks/{found[1]}/{_BLOCK_NORM[found[2]]}/{_NORM[found[3]]}"


def _outer_norm(found: re.Match[str]) -> str:
    return f"{_OUTER_NORM[found[1]]}/{_NORM[found[2]]}"


def _dense(found: re.Match[str]) -> str:
    return f"head/fc/{'kernel' if found[1] == 'weight' else 'bias'}"
