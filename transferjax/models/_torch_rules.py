"""Where the leaves of an EfficientNet-Lite lie in the torch files (package ``efficientnet-lite-pytorch``)."""

from __future__ import annotations

import re

from transferjax import surgery

_NORM_LEAVES = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
_BLOCK_NORMS = ("expand_bn", "depthwise_bn", "project_bn")
_LEAF = rf"({'|'.join(_NORM_LEAVES)})"


def efficientnet_lite(variant: object, file_classes: int, num_classes: int) -> tuple[surgery.Rule, ...]:
    """Rules for a file of ``file_classes`` outputs and a target of ``num_classes``.

    The last dense layer is taken when both agree, ``fresh`` when they differ, and waived when the target has none.
    """
    return (
        surgery.rename(r"_conv_(stem|head)\.weight", r"\1/conv/kernel"),
        surgery.rename(rf"_bn([01])\.{_LEAF}", end_norm),
        surgery.rename(r"_blocks\.(\d+)\._(expand|depthwise|project)_conv\.weight", r"blocks/\1/\2/kernel"),
        surgery.rename(rf"_blocks\.(\d+)\._bn([012])\.{_LEAF}", block_norm),
        surgery.torch_layout("**/kernel"),
        surgery.waive("*.num_batches_tracked"),
        *_classifier(file_classes, num_classes),
    )


def end_norm(found: re.Match[str]) -> str:
    """The BatchNorm of stem (0) or head (1)."""
    return f"{('stem', 'head')[int(found[1])]}/bn/{_NORM_LEAVES[found[2]]}"


def block_norm(found: re.Match[str]) -> str:
    """The BatchNorm behind one convolution of a block."""
    return f"blocks/{found[1]}/{_BLOCK_NORMS[int(found[2])]}/{_NORM_LEAVES[found[3]]}"


def _classifier(file_classes: int, num_classes: int) -> tuple[surgery.Rule, ...]:
    if num_classes == 0:
        return (surgery.waive("_fc.*"),)
    leaves = (surgery.rename(r"_fc\.weight", "head/fc/kernel"), surgery.rename(r"_fc\.bias", "head/fc/bias"))
    return leaves if num_classes == file_classes else (*leaves, surgery.fresh("head/fc/**"))
