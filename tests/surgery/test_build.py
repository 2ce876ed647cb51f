"""plan on EfficientNet-Lite0's real names, and every way in which a plan can be wrong."""

import numpy as np

from transferjax.surgery import fresh, plan
from transferjax.tree import nest, paths


def test_every_tensor_of_lite0_is_accounted_for(lite0_source, lite0_target, lite0_rules):
    made = plan(lite0_source, lite0_target, *lite0_rules)
    assert made.counts() == {"copied": 197, "transformed": 50, "fresh": 0, "waived": 49}
    assert len(lite0_source) == 296 == 197 + 50 + 49
    assert repr(made) == "Plan(296 sources -> 247 targets: 197 copied, 50 transformed, 0 fresh, 49 waived)"
    depthwise = next(m for m in made.moves if m.target == "blocks/3/depthwise/kernel")
    assert (depthwise.source, depthwise.ops) == ("_blocks.3._depthwise_conv.weight", (("permute", (2, 3, 1, 0)),))


def test_a_fresh_head_waives_the_old_head(lite0_source, lite0_target, lite0_rules):
    target = paths(lite0_target)
    target["head/fc/kernel"], target["head/fc/bias"] = np.zeros((1280, 10), "f4"), np.zeros(10, "f4")
    made = plan(lite0_source, nest(target), *lite0_rules, fresh("head/fc/**"))
    assert {"_fc.weight", "_fc.bias"} <= set(made.waived)
    assert made.counts()["fresh"] == 2
