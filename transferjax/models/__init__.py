"""A small zoo in Flax NNX with real public weights, and the rules that move them."""

from transferjax.models._bert import Bert, sentence_embedding
from transferjax.models._efficientnet_lite import EfficientNetLite
from transferjax.models._zoo import create, default_weights, installed_weights, load, names, rules, stages

__all__ = [
    "Bert", "EfficientNetLite", "create", "default_weights", "installed_weights", "load", "names", "rules",
    "sentence_embedding", "stages",
]  # fmt: skip
