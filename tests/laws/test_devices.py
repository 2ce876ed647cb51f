"""A step on eight simulated devices equals one device, and every step lowers for CUDA and TPU."""

import subprocess
import sys
import textwrap

import jax
import optax
import pytest

import transferjax as tj

PROGRAM = """
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp, numpy as np, optax, transferjax as tj
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
whole, data = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
rng = np.random.default_rng(0)
params = {"stem": rng.normal(size=(6, 8)).astype("f"), "head": rng.normal(size=(8, 3)).astype("f")}
batch = {"inputs": rng.normal(size=(32, 6)).astype("f"), "labels": rng.integers(0, 3, 32), "id": np.arange(32),
         "weight": rng.uniform(size=32).astype("f")}

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
    one = run(accumulate, lambda t: jax.tree.map(jnp.asarray, t), None)
    eight = run(accumulate, lambda t: jax.device_put(t, whole), data)
    assert len(eight["state/extra/mean"].sharding.device_set) == 8
    for path, leaf in one.items():
        np.testing.assert_allclose(np.asarray(eight[path]), np.asarray(leaf), rtol=1e-5, atol=1e-5, err_msg=path)
print("same on", jax.device_count())
"""


def test_a_step_on_eight_devices_equals_one():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(PROGRAM)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "same on 8", done.stderr[-2000:]


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
