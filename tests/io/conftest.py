"""What the checkpoint tests share: a small tree, and ways to damage a file."""

import pathlib
import random
import types

import ml_dtypes
import numpy as np
import pytest

from transferjax._errors import CheckpointError
from transferjax.io import open as open_checkpoint

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"


def small_tree():
    rng = np.random.default_rng(0)
    return {
        "stem": {"kernel": rng.normal(size=(3, 5)).astype(np.float32), "bias": rng.normal(size=5).astype(np.float16)},
        "blocks": [{"scale": np.ones(4, ml_dtypes.bfloat16)}, {"scale": np.arange(4, dtype=np.int64)}],
        "head": {"mask": np.array([True, False]), "count": np.array(7, np.uint8), "lut": np.zeros((2, 2), np.uint16)},
    }


def read_all(path):
    checkpoint = open_checkpoint(path)
    return {name: checkpoint[name] for name in checkpoint}


def same(a, b):
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes() for k in a
    )


def damaged(data, seed):
    """One of: truncated, a flipped bit, a random byte, a run of zeros, an inserted or a deleted run."""
    rng = random.Random(seed)
    out = bytearray(data)
    at = rng.randrange(len(out))
    if rng.random() < 0.3:  # headers are where damage is interesting, and they are short
        at = (
            rng.randrange(min(len(out), 300))
            if rng.random() < 0.5
            else len(out) - 1 - rng.randrange(min(len(out), 300))
        )
    way = rng.randrange(6)
    if way == 0:
        return bytes(out[:at])
    if way == 1:
        out[at] ^= 1 << rng.randrange(8)
    elif way == 2:
        out[at] = rng.randrange(256)
    elif way == 3:
        run = slice(at, at + rng.randrange(1, 30))
        out[run] = bytes(len(out[run]))
    elif way == 4:
        out[at:at] = rng.randbytes(rng.randrange(1, 9))
    else:
        del out[at : at + rng.randrange(1, 9)]
    return bytes(out)


def survives(path, original=None):
    """The right arrays or a CheckpointError; any other exception propagates. Returns whether it raised."""
    try:
        found = read_all(path)
    except CheckpointError as error:
        assert 20 < len(str(error)) < 2000
        return True
    if original is not None:
        assert same(found, original), "damage was served as if it were data"
    return False


@pytest.fixture
def tree():
    return small_tree()


@pytest.fixture(scope="session")
def kit():
    """The helpers of this file by name."""
    return types.SimpleNamespace(
        small_tree=small_tree, read_all=read_all, same=same, damaged=damaged, survives=survives, fixtures=FIXTURES
    )
