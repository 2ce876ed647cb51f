"""Many runs of one function: equal to each alone, and what they share is computed once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transferjax.finetune import _over_runs
from transferjax.finetune._over_runs import over_runs, split_shared
from transferjax.program import cost, inline


def function(state, item, shared):
    hidden = jnp.tanh(shared["x"] @ shared["stem"])
    return {"w": state["w"] - item * (hidden @ state["w"]).mean()}, {"out": hidden @ state["w"], "item": item}


@pytest.fixture
def arguments():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))
    return {"w": draw(3, 5, 2)}, draw(3), {"x": draw(4, 6), "stem": draw(6, 5)}


@pytest.mark.parametrize("small", [-1, _over_runs.SMALL], ids=["one by one", "side by side"])
def test_both_forms_equal_each_run_alone(small, arguments, monkeypatch):
    monkeypatch.setattr(_over_runs, "SMALL", small)
    states, inputs, shared = arguments
    new, outputs = jax.jit(over_runs)(states, inputs, shared)
    for run in range(3):
        state, output = function({"w": states["w"][run]}, inputs[run], shared)
        np.testing.assert_allclose(new["w"][run], state["w"], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(outputs["out"][run], output["out"], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(outputs["item"], inputs)


over_runs = (lambda inner: lambda states, inputs, shared: inner(function, states, inputs, shared))(over_runs)


@pytest.mark.parametrize("small", [-1, _over_runs.SMALL], ids=["one by one", "side by side"])
def test_what_runs_share_is_computed_once(small, arguments, monkeypatch):
    monkeypatch.setattr(_over_runs, "SMALL", small)
    states, inputs, shared = arguments
    three = cost(jax.jit(over_runs).trace(states, inputs, shared).jaxpr, platform="cpu").contractions
    one = cost(jax.make_jaxpr(function)({"w": states["w"][0]}, inputs[0], shared), platform="cpu").contractions
    stem, head = 2 * 4 * 6 * 5, 2 * 4 * 5 * 2
    mean = one - stem - head  # the same product again, and the mean
    assert three == stem + 3 * (head + mean)


def test_the_cpu_runs_small_ones_side_by_side_and_large_ones_or_loops_one_by_one(arguments):
    fresh = lambda states, inputs, shared: over_runs(states, inputs, shared)  # traces are kept by function
    traced = lambda *arguments: str(jax.make_jaxpr(fresh)(*arguments))
    assert "scan" not in traced(*arguments)
    _, inputs, shared = arguments
    count = _over_runs.SMALL // (4 * 3 * 5 * 2) + 1
    large = {"w": jax.ShapeDtypeStruct((3, 5, 2 * count), "float32")}
    assert "scan" in traced(large, inputs, shared)

    def looping(states, inputs, shared):
        loop = lambda state, item, shared: (jax.lax.fori_loop(0, item, lambda _, x: x + 1, state), item)
        return _over_runs.over_runs(loop, states, inputs, shared)

    assert "scan" in str(jax.make_jaxpr(looping)(jnp.zeros(3), jnp.arange(3), shared))


def test_cheap_work_on_what_is_shared_stays_with_each_run():
    """A bfloat16 base is not held as a float32 copy; a product of it is."""

    def body(x, base):
        return x + base.astype(jnp.float32) * 2.0, jnp.sum(base @ base) + x.sum()

    jaxpr = inline(jax.make_jaxpr(body)(jnp.ones((2, 2)), jnp.ones((2, 2), jnp.bfloat16)))
    inner = jax.make_jaxpr(lambda base: split_shared(jaxpr, [base])([jnp.ones((2, 2))]))(jnp.ones((2, 2), jnp.bfloat16))
    names = [eqn.primitive.name for eqn in inner.jaxpr.eqns]
    assert names.count("dot_general") == 1 and names.index("dot_general") < len(names) - 2

    held = []
    jax.make_jaxpr(lambda base: held.append(split_shared(jaxpr, [base])))(jnp.ones((2, 2), jnp.bfloat16))
    later = next(cell.cell_contents for cell in held[0].__closure__ if isinstance(cell.cell_contents, list))
    assert {"convert_element_type", "mul"} <= {eqn.primitive.name for eqn in later}
    assert "dot_general" not in {eqn.primitive.name for eqn in later}
