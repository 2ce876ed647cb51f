"""A small zoo in Flax NNX with real public weights, and the rules that move them."""

from transferjax.models._efficientnet_lite import EfficientNetLite
from transferjax.models._zoo import create, default_weights, load, names, rules, stages

__all__ = ["EfficientNetLite", "create", "default_weights", "load", "names", "rules", "stages"]
