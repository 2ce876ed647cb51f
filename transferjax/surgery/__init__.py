"""Where weights come from: rules, and the plan that accounts for every leaf."""

from transferjax.surgery._build import plan
from transferjax.surgery._ops import Spec
from transferjax.surgery._plan import Move, Plan
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
from transferjax.surgery._structure import fuse, split, stack, tie, unstack
from transferjax.surgery._trees import assemble, leaves

__all__ = [
    "Lead", "Move", "Naming", "Plan", "Rule", "Spec", "Transform", "assemble", "cast", "dots_to_slashes", "fresh",
    "fuse", "leaves", "permute", "plan", "rename", "reshape", "split", "stack", "tie", "torch_layout", "unstack",
    "waive",
]  # fmt: skip
