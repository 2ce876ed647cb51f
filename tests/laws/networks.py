"""Six tiny networks, a batch for each, and every tuning of the family on each of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

import transferjax as tj
from transferjax.models._bert import Bert, Variant

CLASSES, TOKENS, WIDTH = 3, 5, 8
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
"""Options of the compiler for programs that run once."""


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
    """A class token, positions, a pre-LN block and a dense layer."""

    @linen.compact
    def __call__(self, x):
        x = linen.Conv(WIDTH, (2, 2), strides=(2, 2), name="patch")(x)
        x = x.reshape(x.shape[0], -1, WIDTH)
        first = self.param("token", linen.initializers.normal(0.02), (1, 1, WIDTH))
        x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, WIDTH)), x], 1)
        x = x + self.param("position", linen.initializers.normal(0.02), (1, x.shape[1], WIDTH))
        x = Block(name="block")(x)
        return linen.Dense(CLASSES, name="head")(linen.LayerNorm(name="norm")(x)[:, 0])


def drawn(shapes, shift=0.0):
    """Arrays of these shapes; nothing is compiled for them."""
    rng = np.random.default_rng(0)
    one = lambda x: shift + 0.4 * np.abs(rng.normal(size=x.shape)) if shift else 0.4 * rng.normal(size=x.shape)
    return jax.tree.map(lambda x: jnp.asarray(one(x).astype(np.float32)), shapes)


def in_nnx(module):
    """A module of NNX as a model, with weights about 0 and statistics above it."""
    model = tj.interop.nnx(nnx.eval_shape(lambda: module(nnx.Rngs(0))))
    return model._replace(params=drawn(model.params), extra=drawn(model.extra, 0.5))


def cnn(**options):
    return in_nnx(lambda rngs: CNN(rngs, **options))


def vit():
    module = ViT()
    shapes = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 6, 6, 3), np.float32))
    return tj.interop.linen(module, drawn(shapes))


def bert():
    variant = Variant(layers=1, width=WIDTH, heads=2, hidden=16, vocabulary=11, positions=TOKENS)
    return in_nnx(lambda rngs: Bert(variant, CLASSES, rngs=rngs))


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32) / np.sqrt(shape[-2])


def scanned():
    """Three layers of attention under one scan, one more beside it, and a head."""
    layer = lambda *more: {"qkv": normal(*more, WIDTH, 3 * WIDTH), "norm": norm(*more)}
    params = {"layers": layer(3), "last": layer(), "head": {"kernel": normal(WIDTH, CLASSES)}}

    def attend(x, layer):
        query, key, value = jnp.split(x @ layer["qkv"], 3, -1)
        weights = jax.nn.softmax(jnp.einsum("btd,bsd->bts", query, key))
        x = jnp.tanh(x + jnp.einsum("bts,bsd->btd", weights, value))
        return x * layer["norm"]["scale"] + layer["norm"]["bias"]

    def apply(params, extra, x, *, key=None, train=False):
        x, _ = jax.lax.scan(lambda x, layer: (jax.checkpoint(attend)(x, layer), None), x, params["layers"])
        return attend(x, params["last"]).mean(1) @ params["head"]["kernel"], extra

    return tj.Model(apply, None, jax.tree.map(jnp.asarray, params), {})


def norm(*more):
    return {"scale": np.ones((*more, WIDTH), np.float32), "bias": np.zeros((*more, WIDTH), np.float32)}


def lstm():
    """Two recurrent layers, whose weights are constants of a scan, each with a norm behind it, and a head."""

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.RNN(nnx.LSTMCell(WIDTH, WIDTH, rngs=rngs)) for _ in range(2)])
            self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
            self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

        def __call__(self, x):
            for layer, norm in zip(self.layers, self.norms):
                x = norm(layer(x))
            return self.head(x[:, -1])

    return in_nnx(Network)


def plain():
    """Tokens folded into the batch and back, sorted, and summed up."""
    params = {"stem": normal(WIDTH, WIDTH), "last": normal(WIDTH, WIDTH), "norm": norm()}
    params["head"] = {"kernel": normal(WIDTH, CLASSES), "bias": np.zeros(CLASSES)}

    def apply(params, extra, x, *, key=None, train=False):
        folded = jnp.tanh(x.reshape(-1, WIDTH) @ params["stem"])
        x = jnp.sort(folded.reshape(x.shape[0], -1, WIDTH), axis=1).cumsum(1)
        x = x * params["norm"]["scale"] + params["norm"]["bias"]
        x = jnp.tanh(x.reshape(-1, WIDTH) @ params["last"]).reshape(x.shape).max(1)
        return x @ params["head"]["kernel"] + params["head"].get("bias", 0.0), extra

    return tj.Model(apply, None, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params), {})


class Network(NamedTuple):
    """A network and its parts.

    Attributes:
      model: makes it.
      batch: makes a batch for it.
      last: the leaves of its last block.
      kernels: of the last block, for any adapter but those of matrices.
      matrices: kernels of two axes.
      axes: of kernels whose inputs cannot be told from their outputs.
    """

    model: Callable[[], tj.Model]
    batch: Callable[..., dict[str, Any]]
    last: str
    kernels: str
    matrices: str
    axes: dict[str, str] | None = None


NETWORKS = {
    "NNX CNN": Network(cnn, images, "blocks/1/**", "{blocks/1/conv,head}/kernel", "head/kernel"),
    "Linen ViT": Network(vit, images, "block/**", "block/{up,down}/kernel", "block/up/kernel"),
    "NNX BERT": Network(
        bert, texts, "{layers,pooler}/**", "layers/0/attention/{query,value}/kernel",
        "layers/0/attention/query/kernel",
    ),
    "scanned transformer": Network(
        scanned, sequences, "last/**", "last/qkv", "last/qkv", {"layers/qkv": "lio", "last/qkv": "io"}
    ),
    "LSTM": Network(lstm, sequences, "{layers,norms}/1/**", "layers/1/cell/{hi,if}/kernel", "layers/1/cell/hi/kernel"),
    "plain function": Network(plain, sequences, "last", "{last,head/kernel}", "last"),
}  # fmt: skip


@functools.cache
def network(name):
    """``(model, batch)``, each made once."""
    return NETWORKS[name].model(), NETWORKS[name].batch()


def moments(model, selector):
    """What EVA needs to know of the inputs of kernels: of random ones."""
    rng = np.random.default_rng(0)
    found = {}
    for path, leaf in tj.paths(tj.split(model.params, selector)[0]).items():
        x = rng.normal(size=(50, int(np.prod(leaf.shape[:-1])))) * np.arange(1, 1 + int(np.prod(leaf.shape[:-1])))
        found[path] = tj.tuning.Moments(len(x), x.sum(0), x.T @ x)
    return found


def _lora_everywhere(net, model):
    """On the kernels of the last block, and in the scanned transformer on the layers of the scan too."""
    if net.axes is None:
        return tj.lora(net.kernels, 2, alpha=3.0)
    return tj.lora("{layers,last}/qkv", 2, alpha=3.0, axes=net.axes)


TUNINGS: dict[str, Callable[[Network, tj.Model], tj.Tuning]] = {
    "full": lambda net, model: tj.full(),
    "train": lambda net, model: tj.train("head/**"),
    "last": lambda net, model: tj.last(2, ["**/bias", net.last, "head/**"]),
    "bias_only": lambda net, model: tj.bias_only(),
    "norm_only": lambda net, model: tj.norm_only(),
    "lora": _lora_everywhere,
    "lora, rank-stabilised": lambda net, model: tj.lora(net.kernels, 2, alpha=3.0, rank_stabilised=True),
    "lora with ranks per pattern": lambda net, model: tj.lora(
        tj.glob(net.kernels) | "head/kernel", {"head/*": 1, "**": 2}
    ),
    "lora with dropout": lambda net, model: tj.tuning.lora_dropout(tj.lora(net.kernels, 2), 0.5),
    "dora": lambda net, model: tj.dora(net.kernels, 2, alpha=3.0),
    "ia3": lambda net, model: tj.ia3(net.kernels, feedforward=net.matrices),
    "vera": lambda net, model: tj.tuning.vera(net.matrices, 5),
    "oft": lambda net, model: tj.tuning.oft(net.matrices, 2),
    "loha": lambda net, model: tj.tuning.loha(net.kernels, 2),
    "lokr": lambda net, model: tj.tuning.lokr(net.matrices, 1),
    "hira": lambda net, model: tj.tuning.hira(net.kernels, 2),
    "miss": lambda net, model: tj.tuning.miss(net.matrices, 3),
    "shira": lambda net, model: tj.tuning.shira(net.kernels, 0.3),
    "rows": lambda net, model: tj.tuning.rows(net.kernels, [0, 2], axis=-1),
    "entries": lambda net, model: tj.tuning.entries("head/kernel", [(0, 1), (3, 2)]),
    "pissa": lambda net, model: tj.tuning.pissa(net.kernels, 2),
    "olora": lambda net, model: tj.tuning.olora(net.kernels, 2),
    "eva": lambda net, model: tj.tuning.eva(net.kernels, 1, moments(model, net.kernels)),
    "chain": lambda net, model: (
        tj.chain(head=tj.train("head/**"), norm=tj.norm_only(), vera=tj.tuning.vera(net.matrices, 3))
        if "head" not in net.matrices
        else tj.chain(lora=tj.lora("blocks/*/conv/kernel", 2), norm=tj.norm_only(), dora=tj.dora("head/kernel", 1))
    ),
}


def made(tuning, name):
    """The tuning of this name on the network of that name."""
    return TUNINGS[tuning](NETWORKS[name], network(name)[0])


def quantised(kind, tuning, params):
    """A tuning with every floating-point matrix that it leaves frozen in fewer bits; ``None`` where it leaves none."""
    try:
        return tj.tuning.quantise(tj.tuning.frozen_matrices(tuning, params), kind, tuning)
    except tj.SelectionError:
        return None
