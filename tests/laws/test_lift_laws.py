"""Lifted adapters compute, and differentiate to, what merged ones do, at the cost of a side path."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import transferjax as tj
from transferjax.program import cost, lift, materialised
from transferjax.testing import check_step

WIDTH, HEADS, TOKENS, RANK = 16, 4, 6, 2
ids = np.random.default_rng(3).integers(0, 11, (3, TOKENS))


def normal(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32))


class Block(nn.Module):
    """A pre-LN transformer block."""

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(HEADS, name="attention")(nn.LayerNorm(name="norm")(x))
        hidden = nn.gelu(nn.Dense(2 * WIDTH, name="up")(nn.LayerNorm(name="mlp_norm")(x)))
        return x + nn.Dense(WIDTH, name="down")(hidden), None


class Transformer(nn.Module):
    """Two blocks, one after the other or as one that is scanned, each remembered or computed again."""

    scanned: bool = False
    again: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=not self.scanned) if self.again else Block
        if self.scanned:
            block = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            return block(name="layers")(x, None)[0]
        for number in range(2):
            x, _ = block(name=f"block_{number}")(x)
        return x


class LSTM(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.LSTMCell(WIDTH), name="rnn")(x)


class Tied(nnx.Module):
    """Looks tokens up in a table and scores them with the same table."""

    def __init__(self, rngs):
        self.table = nnx.Embed(11, WIDTH, rngs=rngs)
        self.fc = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, tokens):
        return self.table.attend(self.fc(self.table(tokens)))


class Convolutions(nnx.Module):
    """Convolutions and a dense layer."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), strides=(2, 1), rngs=rngs)
        self.point = nnx.Conv(8, 8, (1, 1), rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.point(nnx.relu(self.stem(x)))).mean((1, 2)))


def drawn(shapes):
    """Arrays of these shapes; nothing is compiled for them."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape).astype(np.float32)), shapes)


def linen(module, x):
    return tj.interop.linen(module, drawn(jax.eval_shape(module.init, jax.random.key(0), x)))


def in_nnx(module):
    model = tj.interop.nnx(nnx.eval_shape(lambda: module(nnx.Rngs(0))))
    return model._replace(params=drawn(model.params))


def plain(x):
    apply = lambda params, extra, x, **_: (jnp.einsum("bti,io->tbo", x, params["w"]) @ params["v"].T, extra)
    return tj.Model(apply, None, {"w": normal(WIDTH, 5), "v": normal(7, 5)}, {})


tokens = normal(2, TOKENS, WIDTH)
SCANNED = {"layers/attention/{query,value}/kernel": "lioo", "layers/attention/out/kernel": "liio", "layers/**": "lio"}
CASES = {
    "NNX, convolutions and dense": (lambda: in_nnx(Convolutions), normal(2, 6, 6, 3), "**/kernel", {}),
    "NNX, tied table": (lambda: in_nnx(Tied), ids, "{table/embedding,fc/kernel}", {}),
    "Linen transformer": (
        lambda: linen(Transformer(), tokens), tokens, "**/{query,value,out,up}/kernel", {"alpha": 3.0},
    ),
    "scanned transformer": (
        lambda: linen(Transformer(scanned=True), tokens), tokens, "**/{query,value,out,up,down}/kernel",
        {"axes": SCANNED},
    ),
    "scanned transformer, remat": (
        lambda: linen(Transformer(scanned=True, again=True), tokens), tokens, "**/{query,value}/kernel",
        {"axes": SCANNED},
    ),
    "LSTM": (lambda: linen(LSTM(), tokens), tokens, "**/kernel", {}),
    "plain function": (lambda: plain(tokens), tokens, "*", {"alpha": 0.5, "rank_stabilised": True}),
}  # fmt: skip


def make(name):
    build, inputs, selector, options = CASES[name]
    model, tuning = build(), tj.lora(selector, RANK, **options)
    return model, tuning, drawn(jax.eval_shape(tuning.init, jax.random.key(1), model.params)[0]), model.params, inputs


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_merged_weights(name):
    model, tuning, trainable, frozen, inputs = make(name)
    call = lambda params, inputs: model.apply(params, model.extra, inputs)[0]

    def gradients(run, form):
        def loss(trainable, frozen, inputs):
            outputs = run(form(trainable, frozen), inputs)
            return jnp.mean(jnp.sin(outputs)), outputs

        return jax.jit(jax.grad(loss, has_aux=True))

    lifted, merged = gradients(lift(call, strict=True), tuning.lifted), gradients(call, tuning.merge)
    found, expected = lifted(trainable, frozen, inputs), merged(trainable, frozen, inputs)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * float(jnp.abs(theirs).max()))
    assert materialised(call, tuning.lifted(trainable, frozen), inputs) == ()
    assert lifted.trace(trainable, frozen, inputs).lower(lowering_platforms=("cuda", "tpu"))


def by_hand(model, trainable, inputs, scale):
    """The outputs of a Linen model whose dense layers add a side path that is written by hand."""
    weights = {path.rpartition("/")[0]: leaf for path, leaf in tj.paths(trainable).items()}

    def side(following, args, kwargs, context):
        made = following(*args, **kwargs)
        path = "/".join(context.module.path) + "/kernel"
        if context.method_name != "__call__" or path not in weights:
            return made
        module = trainable
        for part in path.split("/"):
            module = module[part]
        narrow = scale * (args[0] @ module["lora_a"])
        return made + jnp.einsum("...r,rhd->...hd", narrow, module["lora_b"])

    with nn.intercept_methods(side):
        return model.apply(model.params, model.extra, inputs)[0]


def test_the_cost_is_that_of_a_side_path_written_by_hand():
    model = linen(Transformer(), tokens)
    tuning = tj.lora("**/{query,value}/kernel", RANK, alpha=3.0)
    trainable, frozen = drawn(jax.eval_shape(tuning.init, jax.random.key(1), model.params)[0]), model.params
    call = lambda params: model.apply(params, model.extra, tokens)[0]
    forms = {
        "lifted": lambda trainable: lift(call, strict=True)(tuning.lifted(trainable, frozen)),
        "by hand": lambda trainable: by_hand(model, trainable, tokens, 3.0 / RANK),
        "merged": lambda trainable: call(tuning.merge(trainable, frozen)),
    }
    outputs, flops = {}, {}
    for name, form in forms.items():
        loss = lambda trainable, form=form: jnp.sum(jnp.sin(form(trainable)))
        outputs[name], flops[name] = form(trainable), cost(jax.value_and_grad(loss), trainable).flops
    np.testing.assert_allclose(outputs["lifted"], outputs["by hand"], rtol=1e-5, atol=1e-5)
    assert flops["lifted"] <= 1.02 * flops["by hand"] < flops["merged"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_in_lifted_form_keeps_the_laws_of_steps(accumulate, batch):
    """The reference of ``check_step`` is in merge form."""
    rngs = nnx.Rngs(0)
    model = tj.interop.nnx(nnx.Sequential(nnx.Linear(50, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 3, rngs=rngs)))
    flat = {**batch, "inputs": batch["inputs"].reshape(8, -1)}
    kernels = sorted(path for path in tj.paths(model.params) if path.endswith("kernel"))
    tuning = tj.chain(head=tj.train(kernels[1]), lora=tj.lora(kernels[0], 2, alpha=5.0))
    assert tuning.lifted is not None
    objective = tj.objectives.cross_entropy(model.apply)
    check_step(objective, model, tuning, optax.adam(1e-2), flat, accumulate=accumulate)
