"""Which leaves are dense kernels."""

import jax.numpy as jnp
import pytest

import transferjax as tj
from transferjax.testing import check_selector

PARAMS = {
    "stem": {"kernel": jnp.ones((3, 3, 2, 4))},
    "embed": {"embedding": jnp.ones((9, 4))},
    "blocks": {"0": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "1": {"kernel": jnp.ones((4, 4))}},
    "counts": {"kernel": jnp.ones((2, 2), jnp.int32)},
    "head": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)},
}


def test_all_dense_kernels_but_the_head():
    selector = tj.tuning.all_linear("head/**")
    assert tj.tree.matches(PARAMS, selector) == ["blocks/0/kernel", "blocks/1/kernel"]
    check_selector(PARAMS, selector)


def test_attention_kernels_with_an_axis_of_heads_count():
    params = {"attention": {name: {"kernel": jnp.ones((4, 2, 2))} for name in ("query", "out", "conv")}}
    found = tj.tree.matches(params, tj.tuning.all_linear("head/**"))
    assert found == ["attention/out/kernel", "attention/query/kernel"]


def test_it_combines():
    wider = tj.tuning.all_linear("head/**") | "embed/embedding"
    assert tj.tree.matches(PARAMS, wider) == ["blocks/0/kernel", "blocks/1/kernel", "embed/embedding"]


def test_a_head_that_is_no_selector_raises():
    with pytest.raises(tj.SelectionError, match="expected a selector or a glob"):
        tj.tuning.all_linear(None)
