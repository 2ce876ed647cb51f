"""Where the leaves of an EfficientNet-Lite lie in the torch files."""

from __future__ import annotations

from transferjax.models._efficientnet_lite import BlockSpec

_NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}


def convolutions(specs: tuple[BlockSpec, ...]) -> dict[str, str]:
    """``{torch path: target path}`` of every convolution kernel, torch layout OIHW."""
    names = {"_conv_stem.weight": "stem/conv/kernel"}
    for i, spec in enumerate(specs):
        layers = {"_depthwise_conv": "depthwise", "_project_conv": "project"}
        if spec.expansion != 1:
            layers["_expand_conv"] = "expand"
        names |= {f"_blocks.{i}.{old}.weight": f"blocks/{i}/{new}/kernel" for old, new in layers.items()}
    return names | {"_conv_head.weight": "head/conv/kernel"}


def norms(specs: tuple[BlockSpec, ...]) -> dict[str, str]:
    """``{torch module: target module}`` of every BatchNorm."""
    names = {"_bn0": "stem/bn"}
    for i, spec in enumerate(specs):
        layers = {"_bn1": "depthwise_bn", "_bn2": "project_bn"}
        if spec.expansion != 1:
            layers["_bn0"] = "expand_bn"
        names |= {f"_blocks.{i}.{old}": f"blocks/{i}/{new}" for old, new in layers.items()}
    return names | {"_bn1": "head/bn"}


def norm_leaves(specs: tuple[BlockSpec, ...]) -> dict[str, str]:
    """``{torch path: target path}`` of every BatchNorm parameter and statistic."""
    return {
        f"{old}.{torch}": f"{new}/{flax}" for old, new in norms(specs).items() for torch, flax in _NORM.items()
    }
