"""FLOPs of programs whose cost is known, counted on the jaxpr."""

import jax
import jax.numpy as jnp
import pytest

from transferjax.program import Cost, cost, measure
from transferjax.program._cost import as_jaxpr


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def xla_flops(f, *args):
    return measure(jax.jit(f).lower(*args).compile()).flops


def test_matrix_product():
    assert cost(jnp.matmul, shaped(3, 5), shaped(5, 7)).flops == 2 * 3 * 5 * 7


def test_batched_product():
    assert cost(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), shaped(4, 3, 5), shaped(4, 5, 7)).flops == 2 * 4 * 3 * 35


def test_elementwise_is_one_per_element_and_transcendentals_are_apart():
    found = cost(lambda x: jnp.tanh(x + 1.0) * x, shaped(3, 4))
    assert (found.flops, found.transcendentals) == (24, 12)
    assert found.by_primitive == {"add": 12, "mul": 12, "tanh": 12}


@pytest.mark.parametrize(
    "name, f, flops",
    [
        ("sum", jnp.sum, 11),
        ("sum of rows", lambda x: jnp.sum(x, 1), 9),
        ("max", jnp.max, 11),
        ("argmax", lambda x: jnp.argmax(x, 1), 9),
        ("cumsum", lambda x: jax.lax.cumsum(x, 0), 12),
        ("cube", lambda x: x**3, 24),
        ("reshape", lambda x: x.reshape(4, 3), 0),
        ("transpose and cast", lambda x: x.T.astype(jnp.bfloat16), 0),
        ("stop_gradient", jax.lax.stop_gradient, 0),
        ("gather", lambda x: x[jnp.array([0, 2])], None),
    ],
)
def test_reductions_and_moves(name, f, flops):
    found = cost(f, shaped(3, 4))
    assert found.flops == flops or (flops is None and "gather" not in found.by_primitive)
    assert not found.notes


CONVOLUTIONS = {
    "plain": dict(x=(2, 8, 8, 3), w=(3, 3, 3, 5)),
    "valid": dict(x=(2, 8, 8, 3), w=(3, 3, 3, 5), padding="VALID"),
    "strided": dict(x=(2, 9, 8, 3), w=(3, 2, 3, 5), strides=(2, 2)),
    "depthwise": dict(x=(2, 8, 8, 6), w=(3, 3, 1, 6), groups=6),
    "grouped": dict(x=(2, 8, 8, 6), w=(3, 3, 3, 4), groups=2, strides=(2, 1)),
    "dilated": dict(x=(2, 9, 9, 3), w=(3, 3, 3, 5), dilation=(2, 2)),
}


def convolution(x, w, padding="SAME", strides=(1, 1), groups=1, dilation=(1, 1)):
    def f(a, b):
        return jax.lax.conv_general_dilated(
            a,
            b,
            strides,
            padding,
            rhs_dilation=dilation,
            feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    return f, shaped(*x), shaped(*w)


def real_taps(f, x, w):
    """The multiply-adds of a convolution: what it gives for inputs and weights of ones."""
    return int(jnp.sum(f(jnp.ones(x.shape), jnp.ones(w.shape))))


@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_convolution_counts_real_inputs_only(case):
    f, x, w = convolution(**case)
    assert cost(f, x, w).flops == 2 * real_taps(f, x, w)


@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_both_gradients_of_a_convolution_cost_what_it_costs(case):
    f, x, w = convolution(**case)
    forward = cost(f, x, w).flops
    inputs = cost(lambda a, b, g: jax.vjp(f, a, b)[1](g)[0], x, w, jax.eval_shape(f, x, w))
    kernel = cost(lambda a, b, g: jax.vjp(f, a, b)[1](g)[1], x, w, jax.eval_shape(f, x, w))
    assert inputs.contractions == kernel.contractions == forward


def test_convolution_agrees_with_xla():
    f, x, w = convolution(**CONVOLUTIONS["strided"])
    assert cost(f, x, w).flops == xla_flops(f, x, w)


def test_gradient_of_an_mlp_costs_three_forwards_less_the_input_gradient():
    def loss(ws, x):
        for w in ws:
            x = x @ w
        return x.sum()

    ws, x = [shaped(8, 16), shaped(16, 16), shaped(16, 4)], shaped(32, 8)
    layers = [2 * 32 * 8 * 16, 2 * 32 * 16 * 16, 2 * 32 * 16 * 4]
    found = cost(jax.value_and_grad(loss), ws, x)
    assert found.contractions == 3 * sum(layers) - layers[0]


def test_scan_counts_times_its_length_where_xla_counts_once():
    body = lambda c, _: (c @ c, None)
    f = lambda x: jax.lax.scan(body, x, None, length=7)[0]
    assert cost(f, shaped(4, 4)).flops == 7 * 2 * 4**3
    assert cost(f, shaped(4, 4)).flops > 3 * (xla_flops(f, shaped(4, 4)) or 0) > 0


def test_gradient_of_a_scan_over_layers():
    def loss(ws, x):
        return jax.lax.scan(lambda h, w: (jnp.sin(h @ w), None), x, ws)[0].sum()

    found = cost(jax.grad(loss), shaped(5, 8, 8), shaped(3, 8))
    assert found.contractions == 3 * 5 * 2 * 3 * 8 * 8


def test_a_dead_carry_of_a_scan_costs_nothing():
    def f(x):
        return jax.lax.scan(lambda c, _: ((c[0] + 1.0, c[1] @ c[1]), None), (x, x), None, length=3)[0][0]

    assert cost(f, shaped(4, 4)).by_primitive == {"add": 3 * 16}


def test_a_carry_that_another_one_needs_is_alive():
    def f(x):
        return jax.lax.scan(lambda c, _: ((c[1], c[1] @ c[1]), None), (x, x), None, length=3)[0][0]

    assert cost(f, shaped(4, 4)).flops == 3 * 2 * 4**3


def test_while_is_counted_once_and_said():
    f = lambda x: jax.lax.while_loop(lambda c: c.sum() < 9.0, lambda c: c @ c, x)
    found = cost(f, shaped(4, 4))
    assert found.flops == 2 * 4**3 + 15 + 1
    assert found.notes == ("a while loop of unknown length is counted once",)


def test_cond_counts_its_costliest_branch():
    f = lambda x: jax.lax.cond(x.sum() > 0, lambda x: x @ x, lambda x: x, x)
    found = cost(f, shaped(4, 4))
    assert found.contractions == 2 * 4**3
    assert found.notes == ("a cond is counted as its costliest branch",)


@pytest.mark.parametrize("platform, flops", [("cpu", 128), ("tpu", 16), ("cuda", 32), ("rocm", 32)])
def test_platform_dependent_counts_the_branch_of_the_platform(platform, flops):
    def f(x):
        return jax.lax.platform_dependent(
            x, cpu=lambda x: x @ x, cuda=lambda x: x + x + x, rocm=lambda x: x + x + x, default=lambda x: x + x
        )

    found = cost(f, shaped(4, 4), platform=platform)
    assert (found.flops, found.notes) == (flops, ())


def test_dead_code_costs_nothing():
    def f(x):
        _ = x @ x
        return jax.jit(lambda y: (y + 1.0, y @ y))(x)[0]

    assert cost(f, shaped(4, 4)).flops == 16


def test_an_effect_is_not_dead_code():
    def f(x):
        jax.debug.callback(lambda v: None, x @ x)
        return x

    assert cost(f, shaped(4, 4)).flops == 2 * 4**3


def test_remat_counts_what_it_recomputes():
    layer = lambda x, w: jnp.sin(jnp.sin(x @ w) @ w)
    both = lambda f: cost(jax.value_and_grad(lambda w, x: f(x, w).sum()), shaped(4, 4), shaped(4, 4)).contractions
    assert both(jax.checkpoint(layer)) == both(layer) + 2 * 2 * 4**3


def test_remat_without_the_value_runs_forward_once():
    layer = lambda x, w: jnp.sin(jnp.sin(x @ w) @ w)
    alone = lambda f: cost(jax.grad(lambda w, x: f(x, w).sum()), shaped(4, 4), shaped(4, 4)).contractions
    assert alone(jax.checkpoint(layer)) == alone(layer)


def test_custom_derivatives_are_opened():
    @jax.custom_vjp
    def f(x):
        return x @ x

    f.defvjp(lambda x: (f(x), x), lambda x, g: (g @ x @ x,))
    assert cost(f, shaped(4, 4)).contractions == 2 * 4**3
    assert cost(jax.grad(lambda x: f(x).sum()), shaped(4, 4)).contractions == 2 * 2 * 4**3
    assert cost(jax.nn.relu, shaped(4, 4)).flops == 16
    assert cost(jax.grad(lambda x: jax.nn.silu(x).sum()), shaped(4)).transcendentals == 4


def test_shard_map_counts_every_device():
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("d")
    f = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=spec, out_specs=spec)
    assert cost(f, shaped(4, 8)).flops == 2 * 4 * 8 * 4


def test_clipping_and_metrics_are_not_dead():
    grads = lambda w, x: jax.grad(lambda w: (x @ w["a"] @ w["b"]).sum())(w)
    w, x = {"a": shaped(8, 8), "b": shaped(8, 2)}, shaped(4, 8)
    one = cost(lambda w, x: grads(w, x)["b"], w, x)
    both = cost(lambda w, x: (grads(w, x)["b"], jnp.sum(grads(w, x)["a"])), w, x)
    assert one.contractions < both.contractions


def test_bytes_of_windows_are_the_windows():
    f = lambda x, i: jax.lax.dynamic_slice(x, (i, 0), (1, 4))
    found = cost(f, shaped(1000, 4), shaped(dtype=jnp.int32))
    assert found.bytes_read < 100


def test_bytes_of_a_product():
    found = cost(jnp.matmul, shaped(3, 5), shaped(5, 7, dtype=jnp.float32))
    assert (found.bytes_read, found.bytes_written) == (4 * (15 + 35), 4 * 21)


def test_unknown_primitives_are_named():
    found = cost(lambda x: jax.scipy.special.betainc(x, x, x), shaped(4))
    assert found.notes == ("'regularized_incomplete_beta' is counted as one FLOP per element",)


def test_a_body_that_cannot_be_bound_is_counted_once_and_named():
    solve = lambda m, b: jax.lax.custom_linear_solve(lambda x: m @ x, b, lambda f, y: f(y), symmetric=True)
    found = cost(solve, shaped(4, 4), shaped(4))
    assert "each body of 'custom_linear_solve' is counted once" in found.notes


def test_costs_add_and_multiply():
    one = Cost(1, 2, 3, 4, {"add": 1, "exp": 2}, ("a",))
    two = Cost(1, 0, 0, 0, {"dot_general": 1}, ("a", "b"))
    assert one + two == Cost(2, 2, 3, 4, {"add": 1, "exp": 2, "dot_general": 1}, ("a", "b"))
    assert one * 3 == Cost(3, 6, 9, 12, {"add": 3, "exp": 6}, ("a",))


def test_report_holds_the_table_and_the_totals():
    report = cost(lambda x: x @ x, shaped(4, 4)).report()
    assert report.to_dicts() == [{"primitive": "dot_general", "operations": 128, "share of FLOPs": 1.0}]
    assert report.metadata["FLOPs"] == 128


def test_what_is_no_program():
    with pytest.raises(
        TypeError, match="expected a function with its arguments, or a jaxpr without any; got int and 0"
    ):
        as_jaxpr(3)
    jaxpr = jax.make_jaxpr(jnp.sin)(1.0)
    with pytest.raises(TypeError, match="got ClosedJaxpr and 1 arguments"):
        as_jaxpr(jaxpr, 1.0)
    assert as_jaxpr(jaxpr) is jaxpr
    assert cost(jax.jit(jnp.sin).trace(1.0)).transcendentals == 1
