"""A hoisted step does what the step does, for every tuning and network, and says why its cut is where it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj

from .networks import NETWORKS, QUICK, TOKENS, WIDTH, cnn, images, network, sequences


def hoisted_of(model, tuning, batch, *, objective=None, **options):
    train, accumulate = options.pop("train", None), options.pop("accumulate", 1)
    objective = tj.objectives.cross_entropy(model.apply) if objective is None else objective
    tx = optax.sgd(0.1)
    step = tj.make_step(objective, tuning, tx, train=train, accumulate=accumulate)
    state, frozen = tj.init(jax.random.key(1), model, tuning, tx)
    return step, state, frozen, tj.hoist(step, state, frozen, batch, **options)


def compiled(step, quick, *arguments):
    """A step, compiled for these arguments; ``quick`` leaves out the compiler's own optimisations."""
    program = step.jitted.trace(step.objective, *arguments, True).lower().compile(QUICK if quick else {})
    return lambda *arguments: program(step.objective, *arguments, True)


def differences(model, tuning, batch, *, quick=False, **options):
    """The largest difference, over all leaves of the new state and metrics, between the step and the hoisted step."""
    step, state, frozen, hoisted = hoisted_of(model, tuning, batch, **options)
    residual = hoisted.prefix(frozen, state.extra, step.objective, batch)
    other, kept = tj.copy(state), hoisted.keep(frozen)
    whole, late = compiled(step, quick, state, frozen, batch), compiled(hoisted.step, quick, other, kept, residual)
    for _ in range(2):
        state, metrics = whole(state, frozen, batch)
        other, found = late(other, kept, residual)
    assert bool(metrics["finite"])
    ours, theirs = ({**tj.paths(a.trainable), **tj.paths(a.extra), **b} for a, b in ((other, found), (state, metrics)))
    assert ours.keys() == theirs.keys()
    distance = lambda a, b: float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))))
    return max(distance(ours[path], theirs[path]) for path in theirs), hoisted


@pytest.mark.parametrize("name", NETWORKS)
def test_a_hoisted_step_is_the_step(name):
    """With the head alone, to the bit, and what is kept is what goes into it."""
    model, batch = network(name)
    train = None if name == "NNX CNN" else False  # in training mode BERT draws much randomness, slow to compile
    difference, hoisted = differences(model, tj.train("head/**"), batch, train=train)
    assert difference == 0.0
    assert any("what learns first meets the data in" in reason for reason in hoisted.reasons)
    assert hoisted.bytes_per_example == 4 * WIDTH + (8 if "weight" in batch else 4)
    kept = tj.paths(hoisted.keep(tj.init(jax.random.key(1), model, tj.train("head/**"), optax.sgd(0.1))[1]))
    assert not kept, "the backbone is needed by the prefix alone"


@pytest.mark.parametrize("name", ["NNX CNN", "plain function"])
def test_the_two_parts_are_the_objective(name):
    """Against the objective on merged weights, differentiated as it is."""
    model, batch = network(name)
    tuning = tj.chain(head=tj.train("head/**"), last=tj.train(NETWORKS[name].last))
    step, state, frozen, hoisted = hoisted_of(model, tuning, batch, train=False)
    residual = hoisted.prefix(frozen, state.extra, step.objective, batch)
    assert {name: (x.shape, x.dtype) for name, x in residual.items()} == {
        name: (x.shape, x.dtype) for name, x in hoisted.cut.items()
    }

    def whole(trainable):
        return step.objective(tuning.merge(trainable, frozen), state.extra, batch, state.key, False)

    def late(trainable):
        return hoisted.suffix(trainable, frozen, state.extra, step.objective, residual, state.key)

    with_gradients = lambda f: jax.jit(jax.value_and_grad(lambda t: ((out := f(t)).value, out), has_aux=True))
    (_, ours), gradients = with_gradients(late)(state.trainable)
    (_, theirs), expected = with_gradients(whole)(state.trainable)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-6)
    jax.tree.map(close, (ours.value, ours.metrics, ours.extra), (theirs.value, theirs.metrics, theirs.extra))
    jax.tree.map(close, gradients, expected)
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradients)) > 1e-3


def test_dropout_in_the_prefix_moves_the_cut():
    model, batch = cnn(dropout=0.5), images()
    quiet = hoisted_of(model, tj.train("head/**"), batch, train=False)[-1]
    difference, hoisted = differences(model, tj.train("head/**"), batch, train="dropout")
    assert difference == 0.0
    assert hoisted.bytes_per_example == 4 * 6 * 6 * WIDTH + 4 > quiet.bytes_per_example
    assert any(
        "dropout or augmentation draws randomness that enters at select_n" in reason and "'blocks/0/bn/" in reason
        for reason in hoisted.reasons
    )


def test_batch_statistics_in_the_prefix_move_the_cut():
    model, batch = network("NNX CNN")
    difference, hoisted = differences(model, tj.train("head/**"), batch, train=True)
    assert difference <= 2e-7
    assert hoisted.bytes_per_example == 4 * 6 * 6 * WIDTH + 4, "the first convolution's output"
    assert any("examples meet in reduce_sum" in one and "'blocks/0/conv/kernel'" in one for one in hoisted.reasons)
    assert any("blocks/0/bn/mean" in one for one in hoisted.reasons)


def test_an_objective_that_compares_examples_keeps_the_comparison():
    """In-batch contrast of frozen features: the features are kept, their products with each other are not."""
    model, batch = network("plain function")

    def contrast(apply, params, extra, batch, key, train):
        outputs, extra = apply(params, extra, batch["inputs"], key=key, train=train)
        frozen = jnp.tanh(batch["inputs"].reshape(-1, WIDTH) @ params["stem"]).reshape(len(outputs), -1)
        wanted = jax.nn.softmax(frozen @ frozen.T)
        found = jax.nn.log_softmax(outputs @ outputs.T)
        return tj.Loss(-jnp.mean(jnp.sum(wanted * found, -1)), {}, extra)

    objective = jax.tree_util.Partial(contrast, jax.tree_util.Partial(model.apply))
    difference, hoisted = differences(model, tj.train("head/**"), batch, objective=objective)
    assert difference <= 2e-7
    assert any("examples meet in dot_general of (6, 40) float32" in reason for reason in hoisted.reasons)
    assert {one.shape for one in hoisted.cut.values()} == {(6, WIDTH), (6, TOKENS * WIDTH)}


def test_a_wrong_derivative_stays_the_wrong_derivative():
    """Gradient reversal on the head's outputs, and on frozen features."""
    model, batch = network("plain function")
    turned = jax.custom_vjp(lambda x: 2.0 * x)
    turned.defvjp(lambda x: (2.0 * x, None), lambda _, cotangent: (-3.0 * cotangent,))

    def apply(params, extra, x, *, key=None, train=False):
        outputs, extra = model.apply(params, extra, turned(x), key=key, train=train)
        return turned(outputs), extra

    tuning = tj.chain(head=tj.train("head/**"), last=tj.train("last"))
    difference, hoisted = differences(model._replace(apply=apply), tuning, batch)
    assert difference == 0.0
    assert hoisted.bytes_per_example == 4 * TOKENS * WIDTH + 4


def test_examples_that_are_walked_through_in_chunks():
    model = network("plain function")[0]
    batch = sequences(count=8)

    def apply(params, extra, x, *, key=None, train=False):
        features = lambda part: jnp.tanh(part @ params["stem"]).mean(1)
        x = tj.numerics.map_chunks(features, x, 4)
        return x @ params["head"]["kernel"], extra

    difference, hoisted = differences(model._replace(apply=apply), tj.train("head/kernel"), batch)
    assert difference == 0.0
    assert hoisted.bytes_per_example == 4 * WIDTH + 4
    assert "scan" in str(hoisted.prefix_jaxpr())


def test_accumulation_over_parts():
    """The parts have another size than the batch."""
    model, batch = network("plain function")
    batch = {**batch, "weight": np.linspace(0.0, 2.0, 6, dtype=np.float32)}
    difference, _ = differences(model, tj.train("head/**"), batch, accumulate=2, quick=True)
    assert difference <= 2e-7


@pytest.mark.parametrize("name", NETWORKS)
def test_both_parts_lower_for_accelerators(name):
    model, batch = network(name)
    tuning = tj.chain(head=tj.train("head/**"), last=tj.train(NETWORKS[name].last))
    step, state, frozen, hoisted = hoisted_of(model, tuning, batch)
    prefix = hoisted.prefix.jitted.trace(frozen, state.extra, step.objective, batch)
    late = hoisted.step.jitted.trace(step.objective, state, frozen, dict(hoisted.cut), True)
    for traced in (prefix, late):
        text = traced.lower(lowering_platforms=("cuda", "tpu")).as_text()
        assert "stablehlo" in text
