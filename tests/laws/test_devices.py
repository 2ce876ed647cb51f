"""A step on eight simulated devices equals one device, and every step lowers for CUDA and TPU."""

import jax
import optax
import pytest

import transferjax as tj

from .eight_devices import check

PROGRAM = """
params = {"stem": normal(6, 8), "head": normal(8, 3)}
batch = {"inputs": normal(32, 6), "labels": rng.integers(0, 3, 32), "id": np.arange(32), "weight": abs(normal(32))}

def apply(params, extra, inputs, *, key=None, train=False):
    hidden = jnp.tanh(inputs @ params["stem"])
    mean = hidden.mean(0)  # like BatchNorm: over the whole batch, wherever it lies
    return (hidden - mean) @ params["head"], {"mean": 0.9 * extra["mean"] + 0.1 * mean}

def run(accumulate, place, sharding):
    tuning = tj.chain(head=tj.train("head"), lora=tj.lora("stem", 2))
    tx = optax.chain(optax.clip_by_global_norm(0.5), tj.per_group(head=optax.adamw(0.1), lora=optax.sgd(0.1)))
    model = tj.Model(apply, None, place(params), place({"mean": np.zeros(8, "f")}))
    state, frozen = tj.init(jax.random.key(0), model, tuning, tx)
    step = tj.make_step(tj.objectives.cross_entropy(apply), tuning, tx, accumulate=accumulate)
    batches = [batch if sharding is None else jax.device_put(batch, sharding)] * 2
    for state, metrics in tj.fit(step, state, frozen, batches):
        pass
    assert step.jitted._cache_size() == 1
    found = tj.make_eval(apply, {"loss": tj.objectives.negative_log_likelihood}, tuning)(state, frozen, batches)
    return tj.paths({"state": {"trainable": state.trainable, "extra": state.extra}, "loss": metrics["loss"], **found})

for accumulate in (1, 2):
    one, eight = run(accumulate, on_one, None), run(accumulate, on_eight, data)
    spread(eight["state/extra/mean"])
    agree(one, eight)
"""

PARTS = """
params = {"stem": normal(6, 8), "layers": normal(2, 8, 8), "last": normal(8, 8), "head": normal(8, 3)}
batch = {"inputs": normal(32, 6), "labels": rng.integers(0, 3, 32), "id": np.arange(32), "weight": abs(normal(32))}

def apply(params, extra, inputs, *, key=None, train=False):
    hidden = jnp.tanh(inputs @ params["stem"])
    if train is True:
        hidden = hidden * jax.random.bernoulli(key, 0.5, hidden.shape)
    hidden = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), hidden, params["layers"])[0]
    return jnp.tanh(hidden @ params["last"]) @ params["head"], extra

head, axes = tj.train("head"), {"layers": "lio"}
few = {
    "hoist": tj.chain(head=head, last=tj.train("last")),
    "lift": tj.chain(head=head, lora=tj.lora("last", 2)),
    "int8": tj.tuning.quantise("{stem,layers}", "int8", tj.chain(head=head, lora=tj.lora("layers", 2, axes=axes))),
    "nf4": tj.tuning.quantise("{stem,last}", "nf4", tj.chain(head=head, dora=tj.dora("last", 2))),
}

def run(tuning, place, sharding, copies):
    tx = optax.adamw(0.1)
    model = tj.Model(apply, None, place(params), {})
    state, frozen = tj.init(jax.random.key(0), model, tuning, tx)
    step = tj.make_step(tj.objectives.cross_entropy(apply), tuning, tx, train=copies is not None)
    own = batch if sharding is None else jax.device_put(batch, sharding)
    hoisted = tj.hoist(step, state, frozen, batch, copies=copies)
    draws = () if copies is None else (state.key, 1)
    residual = hoisted.prefix(frozen, state.extra, step.objective, own, *draws)
    assert any(name.startswith("hoisted_") for name in residual)
    other, parts = hoisted.step(tj.copy(state), hoisted.keep(frozen), residual)
    state, metrics = step(state, frozen, own)
    if sharding is not None:
        spread(residual, state.trainable)
    return tj.paths({"whole": (state.trainable, metrics), "parts": (other.trainable, parts), "residual": residual})

for name, tuning in few.items():
    copies = 2 if name == "hoist" else None
    one = run(tuning, on_one, None, copies)
    agree(one, run(tuning, on_eight, data, copies))
    if copies is None:
        of = lambda part: {path[len(part):]: leaf for path, leaf in one.items() if path.startswith(part)}
        agree(of("whole/"), of("parts/"))
"""


@pytest.mark.parametrize("program", [PROGRAM, PARTS], ids=["a step", "hoisted, lifted and quantised steps"])
def test_eight_devices_equal_one(program):
    check(program)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_step_lowers_for_accelerators(platform, accumulate, model, batch):
    tuning = tj.chain(head=tj.train("head/**"), lora=tj.lora("stem/kernel", 1), norm=tj.norm_only())
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state, frozen = tj.init(jax.random.key(0), model, tuning, tx)
    step = tj.make_step(tj.objectives.cross_entropy(model.apply), tuning, tx, accumulate=accumulate)
    traced = step.jitted.trace(step.objective, state, frozen, batch, True)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.convolution" in text and "module" in text
