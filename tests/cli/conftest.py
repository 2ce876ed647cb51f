"""A tiny network that the command line imports, and folders of tiny images."""

import sys
import textwrap

import numpy as np
import pytest
from PIL import Image

import transferjax as tj

TINY = """
import jax
import jax.numpy as jnp
import transferjax as tj

def apply(params, inputs, key=None):
    hidden = jnp.tanh(inputs.reshape(inputs.shape[0], -1) @ params["stem"]["kernel"])
    if key is not None and tj.interop.training("head"):
        hidden = hidden + 0.1 * jax.random.normal(key, hidden.shape)
    return hidden @ params["head"]["fc"]["kernel"] + params["head"]["fc"]["bias"]

def make(num_classes, class_names=(), image_size=None):
    size = image_size or 8
    keys = jax.random.split(jax.random.key(0))
    params = {
        "stem": {"kernel": 0.1 * jax.random.normal(keys[0], (size * size * 3, 16))},
        "head": {"fc": {"kernel": 0.1 * jax.random.normal(keys[1], (16, num_classes)), "bias": jnp.zeros(num_classes)}},
    }
    preprocess = tj.Preprocess((size, size), (0.5,) * 3, (0.25,) * 3, "bilinear", class_names)
    return tj.interop.pure(apply, params, preprocess=preprocess)

def without_preprocess(num_classes):
    return make(num_classes)._replace(preprocess=None)

def other_names(num_classes, class_names=(), image_size=None):
    params = make(num_classes, class_names, image_size).params
    forward = lambda params, inputs: apply({"stem": params["z_first"], "head": {"fc": params["a_last"]}}, inputs)
    return tj.interop.pure(forward, {"z_first": params["stem"], "a_last": params["head"]["fc"]})

def broken():
    return {"no": "model"}

def fixed():
    return make(2, (), 8)

def open_ended(**options):
    return make(options.get("num_classes", 3), (), 8)

def raises(num_classes=None):
    raise ValueError("no luck.\\nNor here.")

def unlike(width):
    return make(width)
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty current directory with the importable module ``tiny``."""
    (tmp_path / "tiny.py").write_text(textwrap.dedent(TINY))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("tiny", None)


@pytest.fixture
def photos(workplace):
    """``photos/{dark,light}/N.png``, 6 each: easy to tell apart."""
    rng = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 128)):
        (workplace / "photos" / name).mkdir(parents=True)
        for number in range(6):
            pixels = rng.integers(low, low + 128, (8, 8, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(workplace / "photos" / name / f"{number}.png")
    return workplace / "photos"


@pytest.fixture
def finetune(photos):
    """Runs ``transferjax finetune`` on the photos; further options come behind and win."""
    from transferjax.cli import main

    def run(*options, output="run", tuning="head"):
        given = ["--model", "tiny:make", "--data", "folder:photos", "--batch-size", "4", "--epochs", "2"]
        return main(["finetune", *given, "--tuning", tuning, "--output", output, *options])

    return run


@pytest.fixture
def bases(photos):
    """Two files of weights for the tiny network, with other values each."""
    import tiny

    names = []
    for number in range(2):
        params = tiny.make(2, ("dark", "light"), 8).params
        flat = {path: np.asarray(leaf) + number for path, leaf in tj.paths(params).items()}
        np.savez(f"base{number}.npz", **flat)
        names.append(f"base{number}.npz")
    return names
