"""EfficientNet-Lite0's torch names and shapes, and the rules and outline that a Flax model of it has."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from transferjax.surgery import rename, torch_layout, waive
from transferjax.tree import nest

TABLE = Path(__file__).parents[1] / "fixtures" / "surgery" / "efficientnet_lite0.json"
NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
CONV = {"_expand_conv": "expand", "_depthwise_conv": "depthwise", "_project_conv": "project"}
BN = {"_bn0": "expand_bn", "_bn1": "depthwise_bn", "_bn2": "project_bn"}
STATISTICS = r"(weight|bias|running_mean|running_var)"


@pytest.fixture(scope="session")
def lite0_source():
    """`{torch name: ShapeDtypeStruct}` of the 296 tensors."""
    table = json.loads(TABLE.read_text())
    return {name: jax.ShapeDtypeStruct(shape, np.dtype(dtype)) for name, (shape, dtype) in table.items()}


@pytest.fixture(scope="session")
def lite0_rules():
    return (
        rename(r"_conv_stem\.weight", "stem/conv/kernel"),
        rename(r"_bn0\." + STATISTICS, lambda m: f"stem/bn/{NORM[m[1]]}"),
        rename(r"_blocks\.(\d+)\.(_\w+_conv)\.weight", lambda m: f"blocks/{m[1]}/{CONV[m[2]]}/kernel"),
        rename(r"_blocks\.(\d+)\.(_bn\d)\." + STATISTICS, lambda m: f"blocks/{m[1]}/{BN[m[2]]}/{NORM[m[3]]}"),
        rename(r"_conv_head\.weight", "head/conv/kernel"),
        rename(r"_bn1\." + STATISTICS, lambda m: f"head/bn/{NORM[m[1]]}"),
        rename(r"_fc\.weight", "head/fc/kernel"),
        rename(r"_fc\.bias", "head/fc/bias"),
        torch_layout("**/kernel"),
        waive("*.num_batches_tracked"),
    )


@pytest.fixture(scope="session")
def lite0_target():
    """Nested dicts of abstract leaves, written out by hand from the network's constants."""
    repeats, widths = [1, 2, 2, 3, 3, 4, 1], [16, 24, 40, 80, 112, 192, 320]
    sizes, expands = [3, 3, 5, 3, 5, 5, 3], [1, 6, 6, 6, 6, 6, 6]
    shapes, number, before = {}, 0, 32

    def norm(path, channels):
        shapes.update({f"{path}/{leaf}": (channels,) for leaf in NORM.values()})

    shapes["stem/conv/kernel"] = (3, 3, 3, 32)
    norm("stem/bn", 32)
    for repeat, width, size, expand in zip(repeats, widths, sizes, expands, strict=True):
        for _ in range(repeat):
            block, inner = f"blocks/{number}", before * expand
            if expand > 1:
                shapes[f"{block}/expand/kernel"] = (1, 1, before, inner)
                norm(f"{block}/expand_bn", inner)
            shapes[f"{block}/depthwise/kernel"] = (size, size, 1, inner)
            norm(f"{block}/depthwise_bn", inner)
            shapes[f"{block}/project/kernel"] = (1, 1, inner, width)
            norm(f"{block}/project_bn", width)
            number, before = number + 1, width
    shapes["head/conv/kernel"] = (1, 1, 320, 1280)
    norm("head/bn", 1280)
    shapes["head/fc/kernel"], shapes["head/fc/bias"] = (1280, 1000), (1000,)
    return nest({path: jax.ShapeDtypeStruct(shape, np.dtype("float32")) for path, shape in shapes.items()})
