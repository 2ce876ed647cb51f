"""Every tuning keeps the laws of tunings, on the parameters of every framework."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax.testing import check_chain, check_tuning

_ROWS = {"stem/kernel": np.random.default_rng(0).normal(size=(50, 18)), "head/kernel": np.eye(4)[[0, 1, 1, 2, 3, 3]]}
MOMENTS = {path: tj.tuning.Moments(len(x), x.sum(0), x.T @ x) for path, x in _ROWS.items()}

TUNINGS = {
    "full": lambda: tj.full(),
    "train": lambda: tj.train("head/**"),
    "train one leaf": lambda: tj.train("norm/scale"),
    "last": lambda: tj.last(2, ["stem/**", "norm/**", "head/**"]),
    "bias_only": lambda: tj.bias_only(),
    "norm_only": lambda: tj.norm_only(),
    "lora on a dense kernel": lambda: tj.lora("head/kernel", 2),
    "lora on a convolution": lambda: tj.lora("stem/kernel", 3, alpha=1.0, rank_stabilised=True),
    "lora on all kernels": lambda: tj.lora("**/kernel", 1),
    "lora with ranks per pattern": lambda: tj.lora("**/kernel", {"head/*": 2, "**": 1}, alpha={"**": 2.0}),
    "lora on all dense kernels": lambda: tj.lora(tj.tuning.all_linear("stem/**"), 2),
    "dora on a dense kernel": lambda: tj.dora("head/kernel", 2, alpha=3.0),
    "dora on a convolution": lambda: tj.dora("stem/kernel", 2),
    "ia3": lambda: tj.ia3("**/kernel", feedforward="stem/*"),
    "vera": lambda: tj.tuning.vera("head/kernel", 5),
    "oft": lambda: tj.tuning.oft("head/kernel", 2),
    "loha": lambda: tj.tuning.loha("**/kernel", 2, alpha=1.0),
    "lokr": lambda: tj.tuning.lokr("head/kernel", 1),
    "hira": lambda: tj.tuning.hira("**/kernel", 2),
    "miss": lambda: tj.tuning.miss("head/kernel", 3),
    "shira": lambda: tj.tuning.shira("{stem,head}/*", 0.3),
    "rows": lambda: tj.tuning.rows("**/kernel", [0, 2], axis=-1),
    "entries": lambda: tj.tuning.entries("head/kernel", [(0, 1), (3, 2)]),
    "pissa": lambda: tj.tuning.pissa("**/kernel", 2, alpha=3.0),
    "olora": lambda: tj.tuning.olora("**/kernel", {"head/*": 1, "**": 2}),
    "lora with dropout": lambda: tj.tuning.lora_dropout(tj.lora("**/kernel", 2), 0.5),
    "eva": lambda: tj.tuning.eva("{stem,head}/kernel", 2, MOMENTS),
    "chain of adapters": lambda: tj.chain(
        pissa=tj.tuning.pissa("stem/kernel", 2), ia3=tj.ia3("head/kernel"), norm=tj.norm_only()
    ),
    "chain": lambda: tj.chain(head=tj.train("head/**"), lora=tj.lora("stem/kernel", 2), norm=tj.norm_only()),
    "chain of one": lambda: tj.chain(all=tj.full()),
}

FACTORISED = ("pissa", "olora", "chain of adapters")
"""Begin as the original weights up to the rounding of a residual."""


@pytest.mark.parametrize("name", TUNINGS)
def test_every_tuning(name, model):
    check_tuning(TUNINGS[name](), model.params, atol=1e-6 if name in FACTORISED else 0.0)


def test_the_order_of_groups_never_matters(model):
    groups = {"head": tj.train("head/bias"), "lora": tj.lora("{stem,head}/kernel", 2), "norm": tj.norm_only()}
    check_chain(model.params, **groups)
    check_chain(model.params, ia3=tj.ia3("head/kernel"), dora=tj.dora("stem/kernel", 2), norm=tj.norm_only())


@pytest.mark.parametrize("name", TUNINGS)
def test_every_tuning_on_a_bfloat16_base(name, dict_model):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), dict_model.params)
    check_tuning(TUNINGS[name](), params, atol=2**-8 if name in FACTORISED else 0.0)
    frozen = TUNINGS[name]().init(jax.random.key(0), params)[1]
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(frozen)} <= {"bfloat16"}


@pytest.mark.parametrize("name", ["full", "train", "bias_only", "norm_only", "chain"])
def test_every_tuning_on_lists_and_dataclasses(name):
    kernel = jnp.ones((3, 3, 2, 4))
    params = {
        "stem": {"kernel": kernel},
        "norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)},
        "head": [jnp.ones(2), (jnp.ones(3), {"bias": jnp.ones(1)})],
    }
    check_tuning(TUNINGS[name](), params)


ON_KERNELS = ("lora with ranks per pattern", "dora on a dense kernel", "ia3", "vera", "oft", "loha", "hira", "shira")


@pytest.mark.parametrize("name", ON_KERNELS)
def test_adapters_stand_on_a_quantised_base(name, dict_model):
    """With a quantised kernel in its place, ``merge`` is that of the kernel it stands for."""
    params = {**dict_model.params, "stem": {"kernel": jnp.ones((3, 3, 2, 4))}}
    tuning = TUNINGS[name]()
    trainable, frozen = tuning.init(jax.random.key(0), params)
    trainable = jax.tree.map(lambda w: w + 0.3, trainable)
    quantised = tj.program.quantise_int8(frozen["head"]["kernel"])
    merged = tuning.merge(trainable, {**frozen, "head": {**frozen["head"], "kernel": quantised}})
    expected = tuning.merge(trainable, {**frozen, "head": {**frozen["head"], "kernel": quantised.dense()}})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), merged, expected)


LIFTED = ("lora with ranks per pattern", "dora on a dense kernel", "ia3", "vera", "pissa", "lora with dropout", "eva")


@pytest.mark.parametrize("name", LIFTED)
def test_these_have_a_lifted_form(name):
    assert TUNINGS[name]().lifted is not None
