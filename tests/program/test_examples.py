"""Following the example axis, against what happens when one example of a batch is replaced by another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from transferjax.program._examples import Layout, Mixed, after_replacement, complete, leading, part, reshaped
from transferjax.program._hoist import Follow

B, T, C = 4, 3, 5
RNG = np.random.default_rng(0)
X = RNG.normal(size=(B, T, C)).astype(np.float32)
W = RNG.normal(size=(C, C)).astype(np.float32)
IMAGES = RNG.normal(size=(B, 6, 6, 2)).astype(np.float32)
IDS = RNG.integers(0, 7, (B, T))
TABLE = RNG.normal(size=(7, C)).astype(np.float32)

turned = jax.custom_vjp(lambda x: 2.0 * x)
turned.defvjp(lambda x: (2.0 * x, None), lambda _, g: (-g,))


def convolution(x):
    kernel = jnp.ones((3, 3, 1, 2))
    return lax.conv_general_dilated(
        x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
    )


def loop(x):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ W)), (0, x))[1]


def attention(x):
    return jnp.einsum("bts,bsc->btc", jax.nn.softmax(jnp.einsum("btc,bsc->bts", x, x)), x)


def recurrent(x):
    return lax.scan(lambda c, row: (jnp.tanh(c @ W + row), c), jnp.zeros((B, C)), x.swapaxes(0, 1))[1]


def views(x):
    both = jnp.tanh(jnp.concatenate([x, -x]) @ W)
    first, second = jnp.split(both, 2)
    return first + both[B:] * second


def chunks(x):
    apart = jnp.reshape(x, (2, 2, T, C))
    return lax.map(lambda part: jnp.cumsum(part, 1) @ W, apart).reshape(B, -1)


def transposed_chunks(x):
    """Every second example on the slower axis, put back in order."""
    return jnp.moveaxis(x.reshape(2, 2, T, C), 1, 0).sum(-1)


KEEP = {
    "elementwise": (lambda x: jnp.where(x > 0, jnp.exp(x), x * x.mean((1, 2), keepdims=True)), X),
    "dense": (lambda x: jax.nn.relu(x @ W + 1.0), X),
    "folded": (lambda x: (x.reshape(-1, C) @ W).reshape(B, T, C), X),
    "left folded": (lambda x: x.reshape(-1, C) @ W, X),
    "axis in the middle": (lambda x: jnp.transpose(x, (1, 0, 2)) @ W, X),
    "attention": (attention, X),
    "reductions": (lambda x: x.max(1) + x.min(1) + jnp.argmax(x, 1) + x.prod(1), X),
    "sorts and sums": (lambda x: jnp.sort(x, 1) + jnp.cumsum(x, 2) + lax.top_k(x, 2)[0].sum(-1, keepdims=True), X),
    "depthwise convolution": (convolution, IMAGES),
    "pooling": (lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"), IMAGES),
    "padding and slices": (lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0)))[:, 1:-1, ::2][:, ::-1], X),
    "embedding": (lambda ids: jnp.asarray(TABLE)[ids], IDS),
    "rows by a shared index": (lambda x: x[:, jnp.array([2, 0])], X),
    "rows by an index of their own": (lambda x: jnp.take_along_axis(x, jnp.argmax(x, 1, keepdims=True), 1), X),
    "a moving slice": (lambda x: lax.dynamic_slice_in_dim(x, 1, 2, 1), X),
    "a row written": (lambda x: lax.dynamic_update_slice_in_dim(x, 2 * x[:, :1], 1, 1), X),
    "two views": (views, X),
    "chunks": (chunks, X),
    "examples on two axes": (transposed_chunks, X),
    "recurrence": (recurrent, X),
    "while": (loop, X),
    "branch": (lambda x: lax.cond(jnp.asarray(W).sum() > 0, jnp.sin, jnp.cos, x), X),
    "platforms": (lambda x: lax.platform_dependent(x, cpu=jnp.sin, default=jnp.cos), X),
    "custom derivative": (lambda x: turned(x @ W), X),
    "remat": (lambda x: jax.checkpoint(lambda y: jax.jit(jnp.sin)(y) @ W)(x), X),
    "no rule: scatter": (lambda x: x.at[:, jnp.array([0, 2])].add(1.0), X),
    "no rule: fft": (lambda x: jnp.abs(jnp.fft.rfft(x, axis=2)), X),
    "no rule: eigenvalues": (lambda x: jnp.linalg.eigvalsh(jnp.einsum("btc,bsc->bts", x, x)), X),
}
MIX = {
    "mean": (lambda x: x - x.mean(0), X, "reduce_sum"),
    "contrast": (lambda x: x.reshape(B, -1) @ x.reshape(B, -1).T, X, "dot_general"),
    "outer product": (lambda x: x[:, None] + x[None], X, "add"),
    "folded mean": (lambda x: x.reshape(-1, C).sum(0), X, "reduce_sum"),
    "another order": (lambda x: x[::-1] + x, X, "rev"),
    "first example": (lambda x: x + x[:1], X, "slice"),
    "every second": (lambda x: x[::2], X, "slice"),
    "sort of the batch": (lambda x: jnp.sort(x, 0), X, "sort"),
    "running sum": (lambda x: jnp.cumsum(x, 0), X, "cumsum"),
    "examples as features": (lambda x: jnp.moveaxis(x, 0, -1) @ jnp.ones((B, 2)), X, "dot_general"),
    "a reshape across examples": (lambda x: x[:, :, :2].reshape(3, -1), X, "reshape"),
    "rows of others": (lambda x: x[jnp.array([1, 0, 3, 2])], X, "gather"),
    "carry": (
        lambda x: lax.scan(lambda c, row: (c + row, c), jnp.zeros((T, C)), x)[1],
        X,
        "walks through the examples",
    ),
    "length": (
        lambda x: lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1, x),
        X,
        "whose length depends on the batch",
    ),
    "choice": (lambda x: lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x), X, "whose branch depends on the batch"),
    "windows": (lambda x: lax.reduce_window(x, 0.0, lax.add, (2, 1, 1), (1, 1, 1), "SAME"), X, "reduce_window"),
    "no rule: fft": (lambda x: jnp.fft.rfft(x, axis=0), X, "it has no rule, and no test shows"),
    "no rule: eigenvectors": (lambda x: jnp.linalg.inv(jnp.einsum("atc,btc->ab", x, x)), X, "dot_general"),
}


def fact_of(function, x):
    jaxpr = jax.make_jaxpr(function)(x)
    shape = np.shape(x)
    found = Follow("cpu").values(jaxpr.jaxpr, [leading(shape)], shape[0])
    return found[jaxpr.jaxpr.outvars[0]]


@pytest.mark.parametrize("name", KEEP)
def test_where_examples_keep_to_themselves(name):
    function, x = KEEP[name]
    fact = fact_of(function, x)
    assert isinstance(fact, Layout), fact
    value = jax.jit(function)(x)
    packed = fact.pack(value, B)
    np.testing.assert_array_equal(fact.unpack(packed, value.shape), value)
    for example in range(B):
        other = np.array(x)
        other[example] = other[example - 1] if other.dtype != np.float32 else other[example] + 1.5
        after = fact.pack(jax.jit(function)(other), B)
        changed = {row for row in range(B) if not np.array_equal(packed[row], after[row])}
        assert changed == {example}


@pytest.mark.parametrize("name", MIX)
def test_where_examples_meet(name):
    function, x, cause = MIX[name]
    fact = fact_of(function, x)
    assert isinstance(fact, Mixed)
    assert cause in fact.cause


def test_what_has_nothing_to_do_with_the_batch_stays_shared():
    assert fact_of(lambda x: jnp.ones(3) * 2, X) is None


def test_a_reshape_splits_and_joins_factors():
    folded = reshaped((((8, 1),), ((6, 0),)), (48,))
    assert folded == (((8, 1), (6, 0)),)
    assert reshaped(folded, (8, 6)) == (((8, 1),), ((6, 0),))
    assert reshaped(folded, (2, 4, 2, 3)) == (((2, 4),), ((4, 1),), ((2, 0),), ((3, 0),))
    assert reshaped(folded, (16, 3)) == (((8, 1), (2, 0)), ((3, 0),))
    assert reshaped(folded, (3, 16)) is None
    assert complete(folded, 8) and not complete(folded, 4)


def test_a_slice_keeps_all_examples_or_none():
    assert part(((8, 1),), 0, 8, 1) == ((8, 1),)
    assert part(((8, 1),), 0, 4, 1) is None
    assert part(((3, 0), (8, 1)), 8, 24, 1) == ((2, 0), (8, 1))
    assert part(((3, 0), (8, 1)), 4, 12, 1) is None
    assert part(((9, 0),), 1, 8, 3) == ((3, 0),)


def test_what_the_replacement_test_does_not_run():
    eqn = jax.make_jaxpr(lambda x: jnp.fft.rfft(x, axis=1))(jnp.ones((B, 8))).jaxpr.eqns[-1]
    inner = eqn.params["jaxpr"].jaxpr.eqns[-1] if "jaxpr" in eqn.params else eqn
    whole = (((B, 1),), ((8, 0),))
    assert inner.primitive.name == "fft"
    assert after_replacement(inner, [whole], B) == [(((B, 1),), ((5, 0),))]
    assert after_replacement(inner, [whole], 1) is None, "one example has no others"
    assert after_replacement(inner, [(((2, 2),), ((2, 1), (4, 0)))], B) is None, "examples on two axes"
    effect = jax.make_jaxpr(lambda x: jax.debug.callback(lambda _: None, x))(jnp.ones((B, 8))).jaxpr.eqns[-1]
    assert after_replacement(effect, [whole], B) is None
