"""A hoisted step does what the step does, for every tuning and network, and says why its cut is where it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import transferjax as tj
from transferjax.models._bert import Bert, Variant

CLASSES, TOKENS, WIDTH = 3, 5, 8


def images(seed=0, count=6):
    rng = np.random.default_rng(seed)
    return {
        "inputs": rng.normal(size=(count, 6, 6, 3)).astype(np.float32),
        "labels": rng.integers(0, CLASSES, count),
        "id": np.arange(count),
    }


def texts(seed=0, count=6):
    rng = np.random.default_rng(seed)
    mask = np.arange(TOKENS) < rng.integers(2, TOKENS + 1, (count, 1))
    return {
        "inputs": {"input_ids": rng.integers(0, 11, (count, TOKENS)), "attention_mask": mask.astype(np.int32)},
        "labels": rng.integers(0, CLASSES, count),
        "weight": rng.uniform(0.5, 2.0, count).astype(np.float32),
    }


def sequences(seed=0, count=6):
    rng = np.random.default_rng(seed)
    return {
        "inputs": rng.normal(size=(count, TOKENS, WIDTH)).astype(np.float32),
        "labels": rng.integers(0, CLASSES, count),
    }


class CNN(nnx.Module):
    """Two blocks of convolution, BatchNorm and relu, a mean and a dense layer."""

    def __init__(self, rngs, dropout=0.0, width=WIDTH):
        block = lambda a, b: nnx.Dict(
            conv=nnx.Conv(a, b, (3, 3), use_bias=False, rngs=rngs), bn=nnx.BatchNorm(b, rngs=rngs)
        )
        self.blocks = nnx.List([block(3, width), block(width, width)])
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = self.dropout(nnx.relu(block["bn"](block["conv"](x))))
        return self.head(x.mean((1, 2)))


class Block(linen.Module):
    @linen.compact
    def __call__(self, x):
        y = linen.LayerNorm(name="norm")(x)
        x = x + linen.MultiHeadDotProductAttention(num_heads=2, name="attention")(y)
        y = linen.gelu(linen.Dense(2 * WIDTH, name="up")(linen.LayerNorm(name="mlp_norm")(x)))
        return x + linen.Dense(WIDTH, name="down")(y)


class ViT(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(WIDTH, (2, 2), strides=(2, 2), name="patch")(x)
        x = x.reshape(x.shape[0], -1, WIDTH)
        first = self.param("token", linen.initializers.normal(0.02), (1, 1, WIDTH))
        x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, WIDTH)), x], 1)
        x = x + self.param("position", linen.initializers.normal(0.02), (1, x.shape[1], WIDTH))
        for number in range(2):
            x = Block(name=f"blocks_{number}")(x)
        return linen.Dense(CLASSES, name="head")(linen.LayerNorm(name="norm")(x)[:, 0])


def cnn(**options):
    return tj.interop.nnx(CNN(nnx.Rngs(0), **options))


def vit():
    module = ViT()
    return tj.interop.linen(module, module.init(jax.random.key(0), jnp.ones((1, 6, 6, 3))))


def bert():
    variant = Variant(layers=2, width=WIDTH, heads=2, hidden=16, vocabulary=11, positions=TOKENS)
    return tj.interop.nnx(Bert(variant, CLASSES, rngs=nnx.Rngs(0)))


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32) / np.sqrt(shape[-2])


def scanned():
    """Three layers of attention under one scan, one more beside it, and a head."""
    layer = lambda *more: {"qkv": normal(*more, WIDTH, 3 * WIDTH), "bias": np.zeros((*more, WIDTH), np.float32)}
    params = {"layers": layer(3), "last": layer(), "head": {"kernel": normal(WIDTH, CLASSES)}}

    def attend(x, layer):
        query, key, value = jnp.split(x @ layer["qkv"], 3, -1)
        weights = jax.nn.softmax(jnp.einsum("btd,bsd->bts", query, key))
        return jnp.tanh(x + jnp.einsum("bts,bsd->btd", weights, value) + layer["bias"])

    def apply(params, extra, x, *, key=None, train=False):
        x, _ = jax.lax.scan(lambda x, layer: (jax.checkpoint(attend)(x, layer), None), x, params["layers"])
        return attend(x, params["last"]).mean(1) @ params["head"]["kernel"], extra

    return tj.Model(apply, None, jax.tree.map(jnp.asarray, params), {})


def lstm():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.RNN(nnx.LSTMCell(WIDTH, WIDTH, rngs=rngs)) for _ in range(2)])
            self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.head(x[:, -1])

    return tj.interop.nnx(Network(nnx.Rngs(0)))


def plain():
    """Tokens folded into the batch and back, sorted, and summed up."""
    params = {"stem": normal(WIDTH, WIDTH), "last": normal(WIDTH, WIDTH), "head": {"bias": np.zeros(CLASSES)}}
    params["head"]["kernel"] = normal(WIDTH, CLASSES)

    def apply(params, extra, x, *, key=None, train=False):
        folded = jnp.tanh(x.reshape(-1, WIDTH) @ params["stem"])
        x = jnp.sort(folded.reshape(x.shape[0], -1, WIDTH), axis=1).cumsum(1)
        x = jnp.tanh(x.reshape(-1, WIDTH) @ params["last"]).reshape(x.shape).max(1)
        return x @ params["head"]["kernel"] + params["head"]["bias"], extra

    return tj.Model(apply, None, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params), {})


# model, batch, the last block, kernels in it for an adapter, and the bytes per example with the head alone
NETWORKS = {
    "NNX CNN": (cnn, images, "blocks/1/**", "blocks/1/conv/kernel", 4 * WIDTH + 4),
    "Linen ViT": (vit, images, "blocks_1/**", "blocks_1/up/kernel", 4 * WIDTH + 4),
    "NNX BERT": (bert, texts, "{layers/1,pooler}/**", "layers/1/attention/{query,value}/kernel", 4 * WIDTH + 8),
    "scanned transformer": (scanned, sequences, "last/**", "last/qkv", 4 * WIDTH + 4),
    "LSTM": (lstm, sequences, "layers/1/**", "layers/1/cell/hi/kernel", 4 * WIDTH + 4),
    "plain function": (plain, sequences, "last", "last", 4 * WIDTH + 4),
}
TUNINGS = {
    "head": lambda last, kernel: tj.train("head/**"),
    "last block and head": lambda last, kernel: tj.chain(head=tj.train("head/**"), last=tj.train(last)),
    "lora on the last block": lambda last, kernel: tj.chain(head=tj.train("head/**"), lora=tj.lora(kernel, 2)),
    "bias_only": lambda last, kernel: tj.bias_only(),
}


@functools.cache
def network(name):
    make, batch, *rest = NETWORKS[name]
    return make(), batch(), *rest


def hoisted_of(model, tuning, batch, *, objective=None, **options):
    train, accumulate = options.pop("train", None), options.pop("accumulate", 1)
    objective = tj.objectives.cross_entropy(model.apply) if objective is None else objective
    tx = optax.sgd(0.1)
    step = tj.make_step(objective, tuning, tx, train=train, accumulate=accumulate)
    state, frozen = tj.init(jax.random.key(1), model, tuning, tx)
    return step, state, frozen, tj.hoist(step, state, frozen, batch, **options)


def compiled(step, quick, *arguments):
    """A step, compiled for these arguments; ``quick`` leaves out the compiler's own optimisations."""
    options = {"xla_backend_optimization_level": 0} if quick else {}
    program = step.jitted.trace(step.objective, *arguments, True).lower().compile(compiler_options=options)
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


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_hoisted_step_is_the_step(name, tuning):
    model, batch, last, kernel, head_bytes = network(name)
    train = None if name == "NNX CNN" else False  # in training mode BERT draws much randomness, slow to compile
    difference, hoisted = differences(model, TUNINGS[tuning](last, kernel), batch, train=train, quick=tuning != "head")
    assert difference <= (0.0 if tuning == "head" else 2e-7)
    assert any("what learns first meets the data in" in reason for reason in hoisted.reasons)
    if tuning == "head":
        assert hoisted.bytes_per_example == head_bytes
        kept = tj.paths(hoisted.keep(tj.init(jax.random.key(1), model, tj.train("head/**"), optax.sgd(0.1))[1]))
        assert not kept, "the backbone is needed by the prefix alone"


@pytest.mark.parametrize("name", ["NNX CNN", "plain function"])
def test_the_two_parts_are_the_objective(name):
    """Against the objective on merged weights, differentiated as it is."""
    model, batch, last, *_ = network(name)
    tuning = tj.chain(head=tj.train("head/**"), last=tj.train(last))
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
    model, batch = network("NNX CNN")[:2]
    difference, hoisted = differences(model, tj.train("head/**"), batch, train=True)
    assert difference <= 2e-7
    assert hoisted.bytes_per_example == 4 * 6 * 6 * WIDTH + 4, "the first convolution's output"
    assert any("examples meet in reduce_sum" in one and "'blocks/0/conv/kernel'" in one for one in hoisted.reasons)
    assert any("blocks/0/bn/mean" in one for one in hoisted.reasons)


def test_an_objective_that_compares_examples_keeps_the_comparison():
    """In-batch contrast of frozen features: the features are kept, their products with each other are not."""
    model, batch = network("plain function")[:2]

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
    model, batch = network("plain function")[:2]
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
    model, batch = network("plain function")[:2]
    batch = {**batch, "weight": np.linspace(0.0, 2.0, 6, dtype=np.float32)}
    difference, _ = differences(model, tj.train("head/**"), batch, accumulate=2, quick=True)
    assert difference <= 2e-7


@pytest.mark.parametrize("name", NETWORKS)
def test_both_parts_lower_for_accelerators(name):
    model, batch, last, *_ = network(name)
    tuning = tj.chain(head=tj.train("head/**"), last=tj.train(last))
    step, state, frozen, hoisted = hoisted_of(model, tuning, batch)
    prefix = hoisted.prefix.jitted.trace(frozen, state.extra, step.objective, batch)
    late = hoisted.step.jitted.trace(step.objective, state, frozen, dict(hoisted.cut), True)
    for traced in (prefix, late):
        text = traced.lower(lowering_platforms=("cuda", "tpu")).as_text()
        assert "stablehlo" in text
