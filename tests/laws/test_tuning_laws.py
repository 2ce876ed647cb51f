"""Every tuning keeps the laws of tunings, on the parameters of every framework."""

import jax
import jax.numpy as jnp
import pytest

import transferjax as tj
from transferjax.testing import check_chain, check_tuning

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
    "chain": lambda: tj.chain(head=tj.train("head/**"), lora=tj.lora("stem/kernel", 2), norm=tj.norm_only()),
    "chain of one": lambda: tj.chain(all=tj.full()),
}


@pytest.mark.parametrize("name", TUNINGS)
def test_every_tuning(name, model):
    check_tuning(TUNINGS[name](), model.params)


def test_the_order_of_groups_never_matters(model):
    groups = {"head": tj.train("head/bias"), "lora": tj.lora("{stem,head}/kernel", 2), "norm": tj.norm_only()}
    check_chain(model.params, **groups)


@pytest.mark.parametrize("name", TUNINGS)
def test_every_tuning_on_a_bfloat16_base(name, dict_model):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), dict_model.params)
    check_tuning(TUNINGS[name](), params)
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
