"""Every objective keeps the laws of objectives, on networks of every framework."""

import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax.testing import check_objective

ob = tj.objectives
flip = lambda batch, key: {**batch, "inputs": batch["inputs"][:, ::-1]}

OBJECTIVES = {
    "cross_entropy": lambda apply: ob.cross_entropy(apply),
    "cross_entropy, smoothed and weighted": lambda apply: ob.cross_entropy(
        apply, label_smoothing=0.1, class_weights=jnp.array([1.0, 2.0, 3.0])
    ),
    "soft targets": lambda apply: ob.cross_entropy(apply),
    "binary_cross_entropy": lambda apply: ob.binary_cross_entropy(apply, positive_weight=2.0),
    "mean_squared_error": lambda apply: ob.mean_squared_error(apply),
    "supervised": lambda apply: ob.supervised(
        apply, lambda outputs, batch: jnp.abs(outputs - batch["labels"]).sum(-1), {"error": ob.squared_error}
    ),
    "augment": lambda apply: ob.augment(ob.cross_entropy(apply), flip),
    "total": lambda apply: ob.total({"again": 0.5}, task=ob.cross_entropy(apply), again=ob.cross_entropy(apply)),
}
DENSE = ("soft targets", "binary_cross_entropy", "mean_squared_error", "supervised")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective(name, weighted, dict_model, batch):
    batch = {key: value[:3] for key, value in batch.items()}
    if name in DENSE:
        batch["labels"] = np.eye(3, dtype=np.float32)[batch["labels"]]
    if weighted:
        batch["weight"] = np.array([0.5, 1.0, 2.0], np.float32)
    check_objective(OBJECTIVES[name](dict_model.apply), dict_model, batch)


def test_every_framework(model, batch):
    check_objective(ob.cross_entropy(model.apply), model, {key: value[:3] for key, value in batch.items()})


def test_next_token():
    rng = np.random.default_rng(0)
    apply = lambda params, extra, inputs, *, key=None, train=False: (params["table"][inputs], extra)
    model = tj.Model(apply, None, {"table": jnp.asarray(rng.normal(size=(5, 5)).astype(np.float32))}, {})
    batch = {"inputs": rng.integers(0, 5, (3, 4)), "mask": np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]])}
    check_objective(ob.next_token(apply), model, batch)
