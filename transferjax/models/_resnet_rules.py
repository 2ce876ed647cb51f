"""Where the leaves of a ResNet lie in the files of torchvision and of timm, whose names are the same."""

from __future__ import annotations

import re

from transferjax import surgery

_NORM_LEAVES = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
_NORM_LEAF = rf"({'|'.join(_NORM_LEAVES)})"
_DENSE = {"weight": "kernel", "bias": "bias"}
_BLOCK = r"layer(\d+)\.(\d+)"


def torch(variant: object, file_classes: int, num_classes: int) -> tuple[surgery.Rule, ...]:
    r"""Rules for a file of ``file_classes`` outputs and a target of ``num_classes``.

    The classifier is taken when both agree; otherwise the file's is waived, and the target's, where it has one, fresh.

    >>> torch(None, 1000, 10)[-1]
    fresh('head/fc/**')
    """
    return (
        surgery.rename(r"conv1\.weight", "stem/conv/kernel"),
        surgery.rename(rf"bn1\.{_NORM_LEAF}", stem_norm),
        surgery.rename(rf"{_BLOCK}\.conv([123])\.weight", convolution),
        surgery.rename(rf"{_BLOCK}\.bn([123])\.{_NORM_LEAF}", norm),
        surgery.rename(rf"{_BLOCK}\.downsample\.0\.weight", shortcut),
        surgery.rename(rf"{_BLOCK}\.downsample\.1\.{_NORM_LEAF}", shortcut_norm),
        surgery.torch_layout("**/kernel"),
        surgery.waive("*.num_batches_tracked", optional=True),
        *_classifier(file_classes, num_classes),
    )


def _classifier(file_classes: int, num_classes: int) -> tuple[surgery.Rule, ...]:
    if num_classes == file_classes:
        return (surgery.rename(r"fc\.(weight|bias)", dense),)
    waived = surgery.waive("fc.*", optional=True)
    return (waived, surgery.fresh("head/fc/**")) if num_classes else (waived,)


def _block(found: re.Match[str]) -> str:
    return f"stages/{int(found[1]) - 1}/{found[2]}"


def stem_norm(found: re.Match[str]) -> str:
    """The BatchNorm of the stem."""
    return f"stem/bn/{_NORM_LEAVES[found[1]]}"


def convolution(found: re.Match[str]) -> str:
    """A convolution of a block."""
    return f"{_block(found)}/conv{found[3]}/kernel"


def norm(found: re.Match[str]) -> str:
    """The BatchNorm behind it."""
    return f"{_block(found)}/bn{found[3]}/{_NORM_LEAVES[found[4]]}"


def shortcut(found: re.Match[str]) -> str:
    """The convolution of a block's shortcut."""
    return f"{_block(found)}/downsample/conv/kernel"


def shortcut_norm(found: re.Match[str]) -> str:
    """The BatchNorm of a block's shortcut."""
    return f"{_block(found)}/downsample/bn/{_NORM_LEAVES[found[3]]}"


def dense(found: re.Match[str]) -> str:
    """The last dense layer."""
    return f"head/fc/{_DENSE[found[1]]}"
