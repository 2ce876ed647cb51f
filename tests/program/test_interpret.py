"""A jaxpr run equation by equation computes, and differentiates to, what the function does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from transferjax.program._interpret import inline, interpret


@jax.custom_vjp
def reversed_gradient(x):
    return 2.0 * x


reversed_gradient.defvjp(lambda x: (2.0 * x, None), lambda _, g: (-100.0 * g,))


@jax.custom_jvp
def cut(x):
    return jnp.maximum(x, 0.0)


cut.defjvp(lambda primals, tangents: (cut(primals[0]), jnp.where(primals[0] >= 0, 7.0 * tangents[0], 0.0)))


def branches(x):
    y = jax.jit(lambda z: jnp.tanh(z) @ z)(x)
    y = lax.scan(lambda carry, row: (carry + row, carry * row), y[0], y)[1]
    y = lax.platform_dependent(y, cpu=lambda a: 3.0 * a, default=lambda a: a)
    y = lax.while_loop(lambda c: c[1] < 3, lambda c: (c[0] * 1.1, c[1] + 1), (lax.stop_gradient(y), 0))[0] + y
    return lax.cond(y.sum() > 0, jnp.cos, jnp.sin, y)


PROGRAMS = {
    "wrong custom_vjp": lambda x: reversed_gradient(jnp.sin(x)),
    "custom_jvp at 0": lambda x: cut(x - x),
    "relu at 0": lambda x: jax.nn.relu(x - x) + jax.nn.relu(x),
    "remat": lambda x: jax.checkpoint(lambda y: jnp.sin(jnp.sin(y)))(x),
    "loops and branches": branches,
    "nested jit": lambda x: jax.jit(lambda a: jax.jit(lambda b: reversed_gradient(b) + a)(a * 2))(x),
    "randomness": lambda x: x * jax.random.normal(jax.random.key(3), x.shape),
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("platform", [None, "cpu"])
def test_values_and_gradients_are_those_of_the_function(name, platform):
    function, x = PROGRAMS[name], jnp.linspace(-1.0, 1.0, 9).reshape(3, 3)
    jaxpr = jax.make_jaxpr(function)(x)
    flat = inline(jaxpr, platform=platform)
    assert not {"jit", "pjit", "closed_call"} & {eqn.primitive.name for eqn in flat.jaxpr.eqns}
    ways = [lambda x: interpret(jaxpr, [x], platform=platform)[0], lambda x: interpret(flat, [x])[0]]
    loss = lambda f: lambda x: jnp.sum(jnp.sin(f(x)))
    for way in ways:
        np.testing.assert_array_equal(way(x), function(x))
        np.testing.assert_allclose(jax.grad(loss(way))(x), jax.grad(loss(function))(x), rtol=1e-6, atol=1e-7)


def test_a_choice_by_platform_is_the_branch_of_the_platform():
    function = lambda x: lax.platform_dependent(x, tpu=lambda a: 5.0 * a, default=lambda a: a)
    jaxpr = jax.make_jaxpr(function)(1.0)
    assert float(interpret(jaxpr, [jnp.float32(1.0)], platform="tpu")[0]) == 5.0
    assert float(interpret(jaxpr, [jnp.float32(1.0)], platform="cuda")[0]) == 1.0
    assert "cond" in {eqn.primitive.name for eqn in inline(jaxpr).jaxpr.eqns}


def test_a_rule_sees_every_equation_but_opened_calls():
    seen = []

    def rule(eqn, values):
        seen.append(eqn.primitive.name)
        return [values[0] + 1.0] if eqn.primitive.name == "sin" else None

    jaxpr = jax.make_jaxpr(lambda x: jax.jit(jnp.sin)(x) * 2.0)(1.0)
    assert float(interpret(jaxpr, [jnp.float32(1.0)], rule=rule)[0]) == 4.0
    assert seen == ["sin", "mul"]
