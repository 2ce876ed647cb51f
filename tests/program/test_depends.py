"""Which outputs depend on which inputs, and the order in which parameters meet data."""

import jax
import jax.numpy as jnp
import pytest

from transferjax.program import dependencies, order_of_use


def found(f, *args, **options):
    return dependencies(jax.make_jaxpr(f)(*args), **options)


@jax.custom_vjp
def reverse(x):
    return x


reverse.defvjp(lambda x: (x, None), lambda _, g: (-g,))


@jax.custom_vjp
def wrong(x, y):
    return x * 2.0


wrong.defvjp(lambda x, y: (x * 2.0, y), lambda y, g: (y, g))  # x's gradient is y: wrong, and a dependency


CASES = [
    ("pass through", lambda x, y: (y, x), [{1}, {0}]),
    ("constant", lambda x, y: (jnp.ones(3), x), [set(), {0}]),
    ("only the shape", lambda x, y: jnp.zeros_like(x) + y, [{1}]),
    ("times zero", lambda x, y: 0.0 * x + y, [{0, 1}]),
    ("stop_gradient", lambda x, y: jax.lax.stop_gradient(x), [{0}]),
    ("jit", lambda x, y: jax.jit(lambda a, b: (b, a))(x, y), [{1}, {0}]),
    ("nested jit", lambda x, y: jax.jit(jax.jit(lambda a, b: (b + 1, a)))(x, y), [{1}, {0}]),
    ("remat", lambda x, y: jax.checkpoint(lambda a, b: (jnp.sin(b), a))(x, y), [{1}, {0}]),
    ("custom_jvp", lambda x, y: jax.nn.relu(x), [{0}]),
    ("reversed gradient, forwards", lambda x, y: reverse(x) * y, [{0, 1}]),
    ("reversed gradient", lambda x, y: jax.grad(lambda a: reverse(a) * y)(x), [{1}]),
    ("wrong gradient, forwards", lambda x, y: wrong(x, y), [{0}]),
    ("wrong gradient of x", lambda x, y: jax.grad(wrong)(x, y), [{1}]),
    ("wrong gradient of y", lambda x, y: jax.grad(wrong, argnums=1)(x, y), [set()]),
    ("cond", lambda x, y: jax.lax.cond(x > 0, lambda a: a, lambda a: a + 1.0, y), [{0, 1}]),
    ("cond decides a constant", lambda x, y: jax.lax.cond(x > 0, lambda: 1.0, lambda: 2.0), [{0}]),
    (
        "branches that read different things",
        lambda x, y: jax.lax.cond(True, lambda a, b: a, lambda a, b: b, x, y),
        None,
    ),
    ("while", lambda x, y: jax.lax.while_loop(lambda c: c[0] < 3.0, lambda c: (c[0] + 1.0, c[1] * 2.0), (x, y)), None),
    (
        "while with an idle carry",
        lambda x, y: jax.lax.while_loop(lambda c: c[0] < 3.0, lambda c: (c[0] + 1.0, c[1]), (x, y)),
        [{0}, {1}],
    ),
]
EXPECTED = {"branches that read different things": [{0, 1}], "while": [{0}, {0, 1}]}


@pytest.mark.parametrize("name, f, expected", CASES, ids=[c[0] for c in CASES])
def test_dependencies(name, f, expected):
    assert found(f, 1.0, 2.0) == (EXPECTED[name] if expected is None else expected)


def test_scan_carries_a_dependency_one_turn_at_a_time():
    def f(a, b, c):
        turn = lambda carry, _: ((carry[1], carry[2], carry[2]), carry[0])
        return jax.lax.scan(turn, (a, b, c), None, length=4)

    assert found(f, 1.0, 2.0, 3.0) == [{0, 1, 2}, {1, 2}, {2}, {0, 1, 2}]


def test_scan_reads_constants_and_slices():
    f = lambda w, xs: jax.lax.scan(lambda c, x: (c * w, x), 1.0, xs)
    assert found(f, 1.0, jnp.ones(3)) == [{0}, {1}]


def test_gradient_of_one_leaf_does_not_depend_on_the_residual_of_another():
    grad = lambda w, v, x: jax.grad(lambda w: jnp.sum(w * x) + jnp.sum(v * x))(w)
    assert found(grad, 1.0, 2.0, 3.0) == [{2}]


def test_platform_dependent_follows_the_given_platform():
    f = lambda x, y: jax.lax.platform_dependent(x, y, cpu=lambda a, b: a, default=lambda a, b: b)
    assert found(f, 1.0, 2.0, platform="cpu") == [{0}]
    assert found(f, 1.0, 2.0, platform="tpu") == [{1}]
    assert found(f, 1.0, 2.0) == [{0, 1}]


def test_marks_flow_like_inputs_and_die_with_dead_code():
    marked = jax.jit(lambda x: x + 1.0)
    marked_name = lambda eqn: "mark" if eqn.primitive.name == "sin" else None

    def f(x, y):
        _ = jnp.sin(y) * y
        return marked(jnp.sin(x)), jax.lax.scan(lambda c, _: (jnp.sin(c), None), y, None, length=2)[0], x * y

    assert found(f, 1.0, 2.0, marks=marked_name) == [{0, "mark"}, {1, "mark"}, {0, 1}]


def test_integer_and_key_inputs():
    f = lambda key, table, index: (jax.random.normal(key, (2,)), table[index])
    assert found(f, jax.random.key(0), jnp.ones(3), 1) == [{0}, {1, 2}]


def order(f, *args, data):
    return order_of_use(jax.make_jaxpr(f)(*args), data)


def test_order_of_use_inside_loops_and_branches():
    def f(a, b, c, x):
        x = jax.lax.cond(x > 0, lambda x: x * c, lambda x: x, x)
        x = jax.lax.while_loop(lambda y: y * b < 3.0, lambda y: y + 1.0, x)
        return jax.lax.fori_loop(0, 3, lambda i, y: y * a, x)

    assert order(f, 1.0, 2.0, 3.0, 4.0, data={3}) == [2, 1, 0]


def test_a_parameter_that_meets_data_only_in_the_second_turn():
    def f(a, b, x):
        turn = lambda carry, _: ((carry[1] * a, carry[0] + b), None)
        return jax.lax.scan(turn, (x, jnp.zeros(())), None, length=3)[0]

    assert set(order(f, 1.0, 2.0, 3.0, data={2})) == {0, 1}


def test_parameters_of_one_equation_keep_the_order_in_which_they_were_touched():
    assert order(lambda a, b, x: (b * 2.0 * (a + 1.0)) * x, 1.0, 2.0, 3.0, data={2}) == [1, 0]


def test_unused_inputs_are_left_out():
    assert order(lambda a, b, x: (a * x, 1.0), 1.0, 2.0, 3.0, data={2}) == [0]
    assert order(lambda a, b, x: (a * x, b), 1.0, 2.0, 3.0, data={2}) == [0, 1]
