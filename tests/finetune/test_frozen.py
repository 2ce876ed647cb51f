"""Frozen weights are free: no output depends on their cotangents, and the FLOPs are those of the trainables alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax.finetune import FinetuneState, Step
from transferjax.finetune._frozen import frozen_is_frozen, merge_form

BATCH = {"inputs": np.ones((16, 8), np.float32), "labels": np.zeros((16,), np.int32)}
CLIPPED = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


@jax.custom_vjp
def reverse(x):
    return x


reverse.defvjp(lambda x: (x, None), lambda _, g: (-g,))


@jax.custom_vjp
def leaky_matmul(x, w):
    return x @ w


leaky_matmul.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T + jnp.sum(r[0].T @ g), r[0].T @ g))


def network(matmul=jnp.matmul, middle=lambda x: x, wrap=lambda f: f):
    def apply(params, extra, x, *, key=None, train=False):
        for name in ("a", "b", "c"):
            layer = wrap(lambda x, p: jnp.tanh(matmul(x, p["kernel"]) + p["bias"]))
            x = layer(x, params[name])
        return middle(x) @ params["head"]["kernel"], {"steps": extra["steps"] + 1}

    return apply


def make(tuning, tx, apply=None, kind=None, **options):
    apply = network() if apply is None else apply
    dense = {"kernel": jnp.ones((8, 8)) * 0.1, "bias": jnp.zeros(8)}
    params = {**{name: dict(dense) for name in "abc"}, "head": {"kernel": jnp.ones((8, 3))}, "table": jnp.arange(3)}
    model = tj.Model(apply, None, tj.copy(params), {"steps": jnp.zeros(())})
    objective = tj.objectives.cross_entropy(apply)
    step = tj.make_step(objective, tuning, tx, **options) if kind is None else kind(objective, tuning, tx, **options)
    return (step, *tj.init(jax.random.key(0), model, tuning, tx))


TUNINGS = {
    "head": (tj.train("head/**"), CLIPPED),
    "first layer": (tj.train("a/**"), CLIPPED),
    "biases": (tj.bias_only(), CLIPPED),
    "groups": (
        tj.chain(head=tj.train("head/**"), biases=tj.train("*/bias")),
        optax.chain(
            optax.clip_by_global_norm(1.0), tj.per_group(head=optax.adamw(1e-3), biases=optax.sgd(0.1, momentum=0.9))
        ),
    ),
}


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("name", TUNINGS)
def test_it_holds(name, accumulate):
    report = frozen_is_frozen(*make(*TUNINGS[name], accumulate=accumulate), BATCH)
    assert report.column("holds") == [True, True, True]
    assert report.metadata["merge-form adapters (exceptions)"] == "none"


@pytest.mark.parametrize(
    "apply",
    [
        network(middle=reverse),
        network(matmul=leaky_matmul),
        network(wrap=jax.checkpoint),
        network(wrap=jax.jit),
        network(wrap=lambda f: lambda x, p: jax.vmap(f, (0, None))(x, p)),
        network(wrap=lambda f: lambda x, p: jax.lax.cond(x.sum() > 0, f, lambda x, p: x, x, p)),
    ],
    ids=["gradient reversal", "custom_vjp that mixes", "remat", "jit", "vmap", "cond"],
)
@pytest.mark.parametrize("selector", ["head/**", "b/**"])
def test_it_holds_through_calls_and_custom_derivatives(selector, apply):
    frozen_is_frozen(*make(tj.train(selector), CLIPPED, apply), BATCH)


def scaled(selector):
    return tj.tuning.adapter(selector, lambda key, path, leaf: {"by": jnp.ones(())}, lambda w, leaf: leaf * w["by"])


def lora_and(**groups):
    return tj.chain(head=tj.train("head/**"), lora=tj.lora("b/kernel", rank=2), **groups)


@pytest.mark.parametrize(
    "tuning, apply, exceptions",
    [
        (lora_and(), None, "none"),
        (lora_and(other=scaled("{a,c}/kernel")), None, "a/kernel, c/kernel"),
        (lora_and(other=scaled("a/kernel")), network(matmul=leaky_matmul), "a/kernel, b/kernel"),
    ],
    ids=["a lifted form", "none", "an operation that it cannot pass"],
)
def test_adapters_in_merge_form_are_listed(tuning, apply, exceptions):
    report = frozen_is_frozen(*make(tuning, CLIPPED, apply), BATCH)
    assert report.metadata["merge-form adapters (exceptions)"] == exceptions


def test_merge_form_of_whole_leaves_is_empty():
    step, state, frozen = make(tj.train("head/**"), CLIPPED)
    assert merge_form(step.tuning, state.trainable, frozen) == []


class DifferentiatesEverything(Step):
    """A step as it is often written: the gradient of all parameters, of which the frozen part is dropped."""

    clip_first = False
    metric = False

    def _run(self, objective, state, frozen, batch, proceed):
        params = self.tuning.merge(state.trainable, frozen)
        learnable, table = tj.split(params, "*/*")

        def loss(learnable):
            result = objective(tj.fill(learnable, table), state.extra, batch, state.key, False)
            return result.value, result.extra

        (value, extra), gradients = jax.value_and_grad(loss, has_aux=True)(learnable)
        metrics = {"loss": value}
        if self.metric:
            metrics["gradient_norm"] = optax.tree.norm(gradients)
        if self.clip_first:
            gradients = optax.clip_by_global_norm(1.0).update(gradients, optax.EmptyState())[0]
        kept = tj.split(gradients, "head/**")[0]
        updates, opt_state = self.tx.update(kept, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        return FinetuneState(state.step + 1, state.key, trainable, extra, opt_state), metrics


class ClipsFirst(DifferentiatesEverything):
    clip_first = True


class ReportsTheNorm(DifferentiatesEverything):
    metric = True


class DifferentiatesTheFrozenTree(Step):
    """Differentiates both trees, and keeps a frozen gradient in a metric."""

    def _run(self, objective, state, frozen, batch, proceed):
        def loss(trainable, bias):
            rest = {**frozen, "a": {**frozen["a"], "bias": bias}}
            return objective(self.tuning.merge(trainable, rest), state.extra, batch, state.key, False).value

        mine, theirs = jax.grad(loss, argnums=(0, 1))(state.trainable, frozen["a"]["bias"])
        trainable = jax.tree.map(lambda p, g: p - g, state.trainable, mine)
        return FinetuneState(state.step, state.key, trainable, state.extra, state.opt_state), {"peek": jnp.sum(theirs)}


class ComputesTwice(Step):
    def _run(self, objective, state, frozen, batch, proceed):
        new, metrics = super()._run(objective, state, frozen, batch, proceed)
        doubled = {**batch, "inputs": batch["inputs"] + metrics["loss"]}
        return new, {**metrics, "again": super()._run(objective, state, frozen, doubled, proceed)[1]["loss"]}


class SpendsElementwise(Step):
    def _run(self, objective, state, frozen, batch, proceed):
        new, metrics = super()._run(objective, state, frozen, batch, proceed)
        waste = sum(jnp.sum(batch["inputs"] * k) for k in range(200))
        return new, {**metrics, "waste": waste}


def test_a_full_gradient_that_is_dropped_is_dead_code():
    frozen_is_frozen(*make(tj.train("head/**"), optax.adam(1e-3), kind=DifferentiatesEverything), BATCH)


def test_clipping_before_the_frozen_gradients_are_dropped_is_found():
    with pytest.raises(tj.LawError) as error:
        frozen_is_frozen(*make(tj.train("head/**"), optax.adam(1e-3), kind=ClipsFirst), BATCH)
    assert "3 outputs of the step depend on the cotangent of frozen leaves: state/" in str(error.value)
    assert "on a/bias, a/kernel, b/bias, b/kernel, c/bias and 1 more." in str(error.value)
    assert "differentiate with respect to state.trainable only" in str(error.value)


def test_the_norm_of_all_gradients_as_a_metric_is_found_and_named():
    with pytest.raises(tj.LawError, match=r"1 outputs of the step depend .*: metrics/gradient_norm on a/bias"):
        frozen_is_frozen(*make(tj.train("head/**"), optax.adam(1e-3), kind=ReportsTheNorm), BATCH)


def test_a_gradient_of_the_frozen_tree_is_found():
    with pytest.raises(tj.LawError, match=r": metrics/peek on a/bias\. Expected none"):
        frozen_is_frozen(*make(tj.train("head/**"), optax.adam(1e-3), kind=DifferentiatesTheFrozenTree), BATCH)


def test_more_products_than_the_reference_are_found():
    with pytest.raises(
        tj.LawError,
        match=r"the step needs [\d,]+ FLOPs of matrix products and convolutions, a step that differentiates",
    ):
        frozen_is_frozen(*make(tj.train("head/**"), optax.adam(1e-3), kind=ComputesTwice), BATCH)


def test_more_elementwise_work_than_the_reference_is_found():
    with pytest.raises(tj.LawError, match=r"the step needs [\d,]+ FLOPs, a step that differentiates the trainable"):
        frozen_is_frozen(*make(tj.train("head/**"), optax.adam(1e-3), kind=SpendsElementwise), BATCH)


def test_clipping_and_accumulation_cost_nothing():
    flops = lambda *args, **options: frozen_is_frozen(*make(*args, **options), BATCH).to_dicts()[1]["step"]
    plain = flops(tj.train("head/**"), optax.adamw(1e-3))
    assert flops(tj.train("head/**"), CLIPPED, accumulate=4) == pytest.approx(plain, rel=0.01)
