"""Every tuning, optimizer and network keeps the laws of the fine-tuning step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax.testing import check_step

TUNINGS = {
    "full": lambda: tj.full(),
    "train": lambda: tj.train("head/**"),
    "train a first layer": lambda: tj.train("stem/**"),
    "last": lambda: tj.last(2, ["stem/**", "norm/**", "blocks/0/**", "blocks/1/**", "head/**"]),
    "bias_only": lambda: tj.bias_only(),
    "norm_only": lambda: tj.norm_only(),
    "lora on dense kernels": lambda: tj.lora("blocks/*/kernel", 2),
    "lora on a convolution": lambda: tj.lora("stem/kernel", 2, alpha=4.0, rank_stabilised=True),
    "chain": lambda: tj.chain(head=tj.train("head/**"), lora=tj.lora("blocks/*/kernel", 1), norm=tj.norm_only()),
}

clipped = lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2, weight_decay=0.1))
OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    "sgd with momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "clip + adamw": clipped,
    "lion": lambda: optax.lion(1e-3),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "with_average": lambda: tj.optim.with_average(clipped(), 0.9),
    "MultiSteps": lambda: optax.MultiSteps(clipped(), 2),
    "schedule-free": lambda: optax.contrib.schedule_free_adamw(1e-2, warmup_steps=2),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=tj.optim.warmup_cosine(1e-2, 9)),
    "reduce on plateau": lambda: optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=1)),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 3),
}


@pytest.mark.parametrize("name", TUNINGS)
def test_every_tuning(name, dict_model, batch):
    objective = tj.objectives.cross_entropy(dict_model.apply)
    check_step(objective, dict_model, TUNINGS[name](), optax.sgd(0.1), batch, steps=2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(name, dict_model, batch):
    objective = tj.objectives.cross_entropy(dict_model.apply)
    check_step(objective, dict_model, tj.train("{head,blocks/1}/**"), OPTIMIZERS[name](), batch)


def test_a_transform_per_group_behind_a_common_clip(dict_model, batch):
    tuning = tj.chain(head=tj.train("head/**"), lora=tj.lora("blocks/*/kernel", 2))
    tx = optax.chain(optax.clip_by_global_norm(0.1), tj.per_group(head=optax.adamw(1e-2), lora=optax.sgd(0.1)))
    check_step(tj.objectives.cross_entropy(dict_model.apply), dict_model, tuning, tx, batch)


@pytest.mark.parametrize("train", [None, True])
@pytest.mark.parametrize("framework", ["nnx", "linen"])
def test_every_framework(framework, batch, train, request):
    model = request.getfixturevalue(f"{framework}_model")
    objective = tj.objectives.cross_entropy(model.apply)
    tuning = tj.chain(head=tj.train("head/**"), norm=tj.train("norm/scale"))
    tx = tj.per_group(head=clipped(), norm=optax.sgd(0.1))
    check_step(objective, model, tuning, tx, batch, steps=2, train=train)


def test_accumulation(dict_model, batch):
    batch["weight"] = np.linspace(0.0, 2.0, 8, dtype=np.float32)
    objective = tj.objectives.cross_entropy(dict_model.apply)
    check_step(objective, dict_model, tj.train("head/**"), clipped(), batch, steps=2, accumulate=4)


def test_a_frozen_base_in_bfloat16_stays_in_bfloat16(dict_model, batch):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), dict_model.params)
    params["head"] = dict_model.params["head"]
    model = dict_model._replace(params=params)
    batch["inputs"] = batch["inputs"].astype(jnp.bfloat16)
    tuning = tj.chain(head=tj.train("head/**"), norm=tj.norm_only())
    objective = tj.objectives.cross_entropy(model.apply)
    check_step(objective, model, tuning, optax.sgd(0.1), batch, steps=2, rtol=0.02, atol=1e-3)
    state, frozen = tj.init(jax.random.key(0), model, tuning, optax.sgd(0.1))
    dtypes = {path: str(leaf.dtype) for path, leaf in tj.paths((state.trainable, frozen)).items()}
    assert dtypes == {
        "0/head/head/bias": "float32",
        "0/head/head/kernel": "float32",
        "0/norm/norm/bias": "bfloat16",
        "0/norm/norm/scale": "bfloat16",
        "1/blocks/0/bias": "bfloat16",
        "1/blocks/0/kernel": "bfloat16",
        "1/blocks/1/bias": "bfloat16",
        "1/blocks/1/kernel": "bfloat16",
        "1/stem/kernel": "bfloat16",
    }


def test_training_leaves_the_statistics_of_frozen_modules_alone(nnx_model, batch):
    objective, tx = tj.objectives.cross_entropy(nnx_model.apply), optax.sgd(0.1)
    for tuning, moves in ((tj.train("head/**"), False), (tj.train("norm/bias"), True)):
        state, frozen = tj.init(jax.random.key(0), nnx_model, tuning, tx)
        state, _ = tj.make_step(objective, tuning, tx)(state, frozen, batch)
        moved = not np.array_equal(state.extra["norm"]["mean"], nnx_model.extra["norm"]["mean"])
        assert moved == moves
