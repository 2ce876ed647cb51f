"""Every objective that looks beyond the labels keeps the laws: teachers, sources, other domains, regularisers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax.testing import check_objective

ob, losses = tj.objectives, tj.objectives.losses
RNG = np.random.default_rng(0)
CLASSES, SOURCE_CLASSES, WIDTH = 3, 5, 4
BATCH = {
    "inputs": RNG.normal(size=(6, 2, 3)).astype(np.float32),
    "labels": np.array([0, 1, 2, 0, 1, 2]),
    "id": np.arange(6),
    "target_inputs": RNG.normal(size=(6, 2, 3)).astype(np.float32) + 1,
}
TAUGHT = {**BATCH, "teacher": {"outputs": RNG.normal(size=(6, CLASSES)).astype(np.float32)}}
draw = lambda *shape: jnp.asarray(RNG.normal(size=shape).astype(np.float32))


def network(params, x):
    maps = tj.interop.mark("maps", jnp.tanh(x @ params["maps"]))
    return tj.interop.mark("body", maps.mean(1)) @ params["head"]["kernel"]


def made(classes, width=WIDTH):
    return tj.interop.pure(network, {"maps": draw(3, width), "head": {"kernel": draw(width, classes)}})


MODEL, TEACHER, SOURCE = made(CLASSES), made(CLASSES, width=7), made(SOURCE_CLASSES)
KEPT = tj.extend(MODEL, "source_head", {"kernel": SOURCE.params["head"]["kernel"], "bias": jnp.zeros(SOURCE_CLASSES)})
PROJECTED = tj.extend(MODEL, "wide", ob.projector(WIDTH, 7, variance=True), key=jax.random.key(0))
AVERAGED = ob.with_teacher(MODEL)
OWN = {"maps": SOURCE.params["maps"]}
CRITERION = ob.cross_entropy
FISHER = jax.tree.map(jnp.abs, OWN)
kd = functools.partial(losses.kd, temperature=2.0)
squares = lambda params, batch, layers: mean(jnp.mean(layers["body"] ** 2, axis=1), batch)


def mean(values, batch):
    weight = batch.get("weight", jnp.ones(len(values)))
    return jnp.sum(weight * values) / jnp.sum(weight)


def opponent(name, width, outputs=1):
    init = ob.discriminator(width, hidden=(6,), outputs=outputs)
    return tj.extend(MODEL, name, init, key=jax.random.key(0))


JUDGED, JOINT = opponent("discriminator", WIDTH), opponent("discriminator", WIDTH * CLASSES)
OPPOSED = opponent("adversary", WIDTH, CLASSES)

EACH = {
    "auxiliary_loss": lambda: (ob.auxiliary_loss(CRITERION, MODEL, squares, at="body", weight=0.3), MODEL),
    "auxiliary_loss alone": lambda: (ob.auxiliary_loss(None, MODEL, squares, at="body"), MODEL),
    "total": lambda: (ob.total({"b": 0.5}, a=CRITERION(MODEL.apply), b=ob.distill(MODEL, TEACHER, kd)), MODEL),
    "distill": lambda: (ob.distill(MODEL, TEACHER, kd, supervised=CRITERION, weight=0.9), MODEL),
    "distill without labels": lambda: (ob.distill(MODEL, TEACHER, kd), MODEL),
    "distill of several": lambda: (ob.distill(MODEL, [TEACHER, made(CLASSES)], losses.dkd), MODEL),
    "distill of several beside labels": lambda: (
        ob.distill(MODEL, [TEACHER, TEACHER], losses.dkd, supervised=CRITERION),
        MODEL,
    ),
    "distill of a kept teacher": lambda: (ob.distill(MODEL, None, kd), MODEL),
    "distill of features": lambda: (ob.distill(PROJECTED, TEACHER, losses.hint, "maps", project="wide"), PROJECTED),
    "distill of variances": lambda: (ob.distill(PROJECTED, TEACHER, losses.vid, "body", project="wide"), PROJECTED),
    "mean_teacher": lambda: (ob.mean_teacher(AVERAGED, kd, decay=0.5, supervised=CRITERION), AVERAGED),
    "delta": lambda: (ob.delta(CRITERION, KEPT, SOURCE, "maps"), KEPT),
    "delta with attention": lambda: (
        ob.delta(
            CRITERION, KEPT, SOURCE, "maps", channel_weights=losses.channel_attention(jnp.arange(WIDTH, dtype=float))
        ),
        KEPT,
    ),
    "lwf": lambda: (ob.lwf(CRITERION, KEPT, SOURCE, at="body"), KEPT),
    "co_tuning": lambda: (
        ob.co_tuning(CRITERION, KEPT, jax.nn.softmax(draw(CLASSES, SOURCE_CLASSES)), at="body"),
        KEPT,
    ),
    "l2_sp": lambda: (ob.l2_sp(OWN), MODEL),
    "l2_sp of a head": lambda: (ob.l2_sp(OWN, jnp.float32(0.1), head="head/**", head_strength=2.0), MODEL),
    "ewc": lambda: (ob.ewc(FISHER, OWN), MODEL),
    "ewc of two tasks": lambda: (ob.ewc([FISHER, FISHER], [OWN, OWN], 3.0), MODEL),
    "mixout": lambda: (ob.mixout(CRITERION(MODEL.apply), OWN, 0.5, "maps"), MODEL),
}
"""Means over examples."""
TOGETHER = {
    "distill of relations": lambda: (ob.distill(MODEL, TEACHER, losses.rkd_angle, "body"), MODEL),
    "distill of classes": lambda: (ob.distill(MODEL, TEACHER, losses.dist), MODEL),
    "bss": lambda: (ob.bss(CRITERION, MODEL, "body"), MODEL),
    "bi_tuning": lambda: (ob.bi_tuning(CRITERION, MODEL, "body", classifier="head"), MODEL),
    "adapt": lambda: (ob.adapt(CRITERION, MODEL, losses.coral, at="body"), MODEL),
    "adapt by mk_mmd": lambda: (ob.adapt(CRITERION, MODEL, losses.mk_mmd, at="maps"), MODEL),
    "adapt by bsp": lambda: (ob.adapt(CRITERION, MODEL, losses.bsp, at="body", weight=1e-3), MODEL),
    "adapt by afn": lambda: (ob.adapt(CRITERION, MODEL, losses.afn, at="body"), MODEL),
    "adapt apart": lambda: (ob.adapt(CRITERION, MODEL, losses.coral, at="body", together=False), MODEL),
    "adapt on_target": lambda: (ob.adapt(CRITERION, MODEL, ob.on_target(losses.mcc)), MODEL),
    "jan": lambda: (ob.jan(CRITERION, MODEL, at="body"), MODEL),
    "dann": lambda: (ob.dann(CRITERION, JUDGED, at="body", steps=100), JUDGED),
    "cdan": lambda: (ob.cdan(CRITERION, JOINT, at="body", progress=0.5), JOINT),
    "cdan by entropy": lambda: (
        ob.cdan(CRITERION, JOINT, at="body", progress=0.5, entropy_conditioning=True),
        JOINT,
    ),
    "mdd": lambda: (ob.mdd(CRITERION, OPPOSED, at="body", steps=100), OPPOSED),
}
"""Examples are compared with each other."""
SUPERVISED = (  # in test_objective_laws.py
    "augment", "binary_cross_entropy", "cross_entropy", "mean_squared_error", "next_token", "supervised",
)  # fmt: skip
NO_OBJECTIVES = (
    "accuracy", "diagonal_fisher", "discriminator", "losses", "negative_log_likelihood", "on_target", "projector",
    "squared_error", "top_k_accuracy", "with_teacher",
)  # fmt: skip


@pytest.mark.parametrize("name", [*EACH, *TOGETHER])
def test_every_objective(name):
    objective, model = {**EACH, **TOGETHER}[name]()
    check_objective(objective, model, TAUGHT if "kept" in name else BATCH, weights=name in EACH)


def test_none_is_left_out():
    run = {name.split()[0] for name in (*EACH, *TOGETHER)}
    assert run | {*SUPERVISED, *NO_OBJECTIVES} == set(ob.__all__)
