"""Where weights come from: rules, and the plan that accounts for every leaf; networks of another width and depth."""

from transferjax.surgery._adapt import adapt
from transferjax.surgery._align import align
from transferjax.surgery._build import plan
from transferjax.surgery._compare import compare
from transferjax.surgery._depth import drop_layers, insert_identity, interleave_layers, map_layers, stack_layers
from transferjax.surgery._growth import growth_report, narrow, widen, widen_aki
from transferjax.surgery._layers import repeat, select
from transferjax.surgery._ops import Spec
from transferjax.surgery._optimizer_state import carry
from transferjax.surgery._plan import Move, Plan
from transferjax.surgery._resize import (
    adapt_input_channels,
    resize_patch_embedding,
    resize_position_embedding,
    resize_rows,
)  # fmt: skip
from transferjax.surgery._rules import (
    Lead,
    Naming,
    Rule,
    Transform,
    cast,
    dots_to_slashes,
    fresh,
    permute,
    rename,
    reshape,
    torch_layout,
    waive,
)  # fmt: skip
from transferjax.surgery._rules_json import rules_from_json, rules_to_json, rules_to_python
from transferjax.surgery._structure import fuse, split, stack, tie, unstack
from transferjax.surgery._trees import assemble, leaves
from transferjax.surgery._units import map_units, unit_map

__all__ = [
    "Lead", "Move", "Naming", "Plan", "Rule", "Spec", "Transform", "adapt", "adapt_input_channels", "align", "assemble",
    "carry", "cast", "compare", "dots_to_slashes", "drop_layers", "fresh", "fuse", "growth_report", "insert_identity",
    "interleave_layers", "leaves", "map_layers", "map_units", "narrow", "permute", "plan", "rename", "repeat",
    "reshape", "resize_patch_embedding", "resize_position_embedding", "resize_rows", "rules_from_json", "rules_to_json",
    "rules_to_python", "select", "split", "stack", "stack_layers", "tie", "torch_layout", "unit_map", "unstack",
    "waive", "widen", "widen_aki",
]  # fmt: skip
