"""The live part of a jaxpr."""

import jax
import jax.numpy as jnp

from transferjax.program import live


def primitives(body):
    return [site.eqn.primitive.name for site in body.sites]


def test_only_what_reaches_a_wanted_output_stays():
    jaxpr = jax.make_jaxpr(lambda x, y: (jnp.sin(x), jnp.cos(y)))(1.0, 2.0)
    assert primitives(live(jaxpr)) == ["sin", "cos"]
    body = live(jaxpr, [False, True])
    assert (primitives(body), body.inputs) == (["cos"], (False, True))


def test_a_call_needs_only_the_operands_of_its_wanted_outputs():
    inner = jax.jit(lambda a, b: (jnp.sin(a), jnp.cos(b)))
    body = live(jax.make_jaxpr(lambda x, y: inner(jnp.tan(x), jnp.exp(y))[1])(1.0, 2.0))
    assert primitives(body) == ["exp", "jit"]
    assert primitives(body.sites[1].bodies[0]) == ["cos"]
    assert body.inputs == (False, True)


def test_while_keeps_what_its_condition_needs():
    def f(x, y, z):
        turn = lambda c: (c[0] + 1.0, c[1] * 2.0, jnp.sin(c[2]))
        return jax.lax.while_loop(lambda c: c[0] < 3.0, turn, (x, y, z))[1]

    body = live(jax.make_jaxpr(f)(1.0, 2.0, 3.0))
    assert body.inputs == (True, True, False)
    assert "sin" not in primitives(body.sites[0].bodies[1])


def test_cond_needs_what_any_branch_needs_and_its_index():
    f = lambda p, x, y, z: jax.lax.cond(p, lambda x, y, z: (x, z), lambda x, y, z: (y, z), x, y, z)[0]
    assert live(jax.make_jaxpr(f)(True, 1.0, 2.0, 3.0)).inputs == (True, True, True, False)


def test_one_branch_of_platform_dependent_needs_no_index():
    f = lambda x, y: jax.lax.platform_dependent(x, y, cpu=lambda a, b: jnp.sin(a), default=lambda a, b: jnp.cos(b))
    jaxpr = jax.make_jaxpr(f)(1.0, 2.0)
    body = live(jaxpr, platform="tpu")
    assert primitives(body) == ["cond"]
    assert body.inputs == (False, True)
    assert live(jaxpr).inputs == (True, True)


def test_platform_without_a_branch_keeps_all_branches():
    f = lambda x: jax.lax.platform_dependent(x, cpu=lambda a: jnp.sin(a), tpu=lambda a: jnp.cos(a))
    body = live(jax.make_jaxpr(f)(1.0), platform="metal")
    assert [primitives(b) for b in body.sites[-1].bodies] == [["sin"], ["cos"]]


def test_gpu_stands_for_cuda_and_rocm_does_not():
    f = lambda x: jax.lax.platform_dependent(x, cuda=lambda a: jnp.sin(a), default=lambda a: jnp.cos(a))
    jaxpr = jax.make_jaxpr(f)(1.0)
    assert primitives(live(jaxpr, platform="gpu").sites[-1].bodies[0]) == ["sin"]
    assert primitives(live(jaxpr, platform="rocm").sites[-1].bodies[0]) == ["cos"]


def test_scalar_bodies_are_not_opened():
    f = lambda x: x.at[jnp.array([0, 0])].add(1.0)
    body = live(jax.make_jaxpr(f)(jnp.ones(3)))
    assert not any(site.bodies for site in body.sites if site.eqn.primitive.name.startswith("scatter"))
