"""A small zoo in Flax NNX, real public weights for some of it, and the rules that move them."""

from transferjax.models._bert import Bert, sentence_embedding
from transferjax.models._efficientnet_lite import EfficientNetLite
from transferjax.models._llama import Llama
from transferjax.models._resnet import ResNet
from transferjax.models._vit import ViT
from transferjax.models._zoo import create, default_weights, installed_weights, load, names, rules, stages

__all__ = [
    "Bert", "EfficientNetLite", "Llama", "ResNet", "ViT", "create", "default_weights", "installed_weights", "load",
    "names", "rules", "sentence_embedding", "stages",
]  # fmt: skip
