"""The graph of a program, before anything is fused."""

import jax
import jax.numpy as jnp

from transferjax.program._lowering import lower
from transferjax.program._walk import live


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def graph_of(function, *args):
    return lower(live(jax.make_jaxpr(function)(*args), platform="cpu"))


def names(function, *args):
    return [node.name for node in graph_of(function, *args).nodes]


def test_calls_are_opened_and_equal_operations_are_one():
    function = lambda x: jax.jit(jnp.sin)(x) + jnp.sin(x)
    assert names(function, array(8, 4)) == ["sin", "add"]


def test_reshapes_are_other_names_of_the_same_bytes():
    graph = graph_of(lambda x: jnp.sin(x.reshape(32)[None]), array(8, 4))
    assert [node.name for node in graph.nodes] == ["sin"]
    assert graph.nodes[0].viewed == {graph.inputs[0]}


def test_numbers_and_smaller_operands_are_broadcast_first():
    assert names(lambda x, b: x * 2.0 + b, array(8, 4), array(4)) == [
        "broadcast_in_dim",
        "mul",
        "broadcast_in_dim",
        "add",
    ]


def test_products_read_their_operands_in_order():
    heads = lambda q, k: jnp.einsum("bthd,bshd->bhts", q, k)
    assert names(heads, array(2, 8, 4, 16), array(2, 8, 4, 16)) == ["transpose", "transpose", "dot_general"]
    assert names(lambda x, w: jnp.einsum("btd,de->bte", x, w), array(2, 8, 4), array(4, 6)) == ["dot_general"]
    assert names(lambda x, w: x @ w.T, array(8, 4), array(6, 4)) == ["dot_general"]
    assert names(lambda x, g: x.T @ g, array(8, 4), array(8, 6)) == ["dot_general"]


def test_remat_makes_nothing_twice_and_a_barrier_of_ones_own_stays():
    sine = lambda x: jnp.sin(jnp.tanh(x))
    square = lambda f: lambda x: jax.grad(lambda x: jnp.sum(f(x)))(x)
    assert names(square(jax.checkpoint(sine)), array(8)).count("tanh") == 1
    assert "optimization_barrier" in names(lambda x: jnp.sin(jax.lax.optimization_barrier(x)), array(8))


def test_a_scan_is_a_loop_on_copies_with_stacked_results():
    def run(x, rows):
        return jax.lax.scan(lambda c, r: (c + r, c * r), x, rows)

    graph = graph_of(run, array(4), array(5, 4))
    loop = next(node for node in graph.nodes if node.name == "loop")
    assert [value.maker.name for value in loop.bases] == ["copy into", "copy into"]
    assert [value.shape for value in loop.outputs] == [(4,), (5, 4)]
    (body,) = loop.bodies
    assert {node.name for node in body.nodes} == {"carry", "dynamic_slice", "add", "mul", "write into"}


def test_a_branch_that_the_platform_decides_is_opened_and_another_is_not():
    chosen = lambda x: jax.lax.platform_dependent(x, cpu=jnp.sin, default=jnp.cos)
    assert names(chosen, array(8)) == ["sin"]
    free = lambda flag, x: jax.lax.cond(flag, jnp.sin, jnp.cos, x)
    graph = graph_of(free, array(dtype=bool), array(8))
    (branches,) = (node for node in graph.nodes if node.name == "branches")
    assert [[node.name for node in body.nodes] for body in branches.bodies] == [["cos"], ["sin"]]


def test_the_gradient_of_pooling_keeps_positions():
    def pooled(x):
        window = ((1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return jnp.sum(jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, *window))

    graph = graph_of(jax.grad(pooled), array(2, 8, 8, 3))
    assert [node.name for node in graph.nodes].count("positions") == 4
    assert graph.outputs[0].maker.name == "scatter_add"
