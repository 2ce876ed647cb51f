"""Data sets, batches, preprocessing and augmentation.

``open`` makes a :class:`Source` of anything; ``batches`` goes through it in a seeded, resumable order; what remains
(scaling, resizing, normalising, augmenting) are pure functions for the device. TFDS and Grain are imported when used.
"""

from transferjax.data._arrays import arrays
from transferjax.data._augment import (
    Augmentation,
    compose,
    cutmix,
    example_keys,
    mixup,
    on_inputs,
    random_crop,
    random_flip,
    random_resized_crop,
    soft_targets,
)
from transferjax.data._batches import Batches, batches
from transferjax.data._device import DeviceBatches, to_device
from transferjax.data._folder import image_folder
from transferjax.data._open import open
from transferjax.data._preprocess import Preprocessor, on_images, preprocess, preprocessor
from transferjax.data._source import CorruptExampleError, Source, check_classes
from transferjax.data._tokenizer import Tokenizer, tokenizer

__all__ = [
    "Augmentation",
    "Batches",
    "CorruptExampleError",
    "DeviceBatches",
    "Preprocessor",
    "Source",
    "Tokenizer",
    "arrays",
    "batches",
    "check_classes",
    "compose",
    "cutmix",
    "example_keys",
    "image_folder",
    "mixup",
    "on_images",
    "on_inputs",
    "open",
    "preprocess",
    "preprocessor",
    "random_crop",
    "random_flip",
    "random_resized_crop",
    "soft_targets",
    "to_device",
    "tokenizer",
]
