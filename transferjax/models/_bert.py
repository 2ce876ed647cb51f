"""The BERT encoder in Flax NNX: MiniLM-L6 and BERT-base."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from transferjax._errors import TransferError, describe

EPSILON = 1e-12
DROPOUT = 0.1
STD = 0.02
LEAST_TOKENS = 1e-9
"""The denominator of the mean over tokens is at least this, as in sentence-transformers."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """The sizes of one encoder.

    Attributes:
      layers: transformer blocks.
      width: features of a token.
      heads: attention heads, each ``width / heads`` wide.
      hidden: features between the two layers of a block's MLP.
      vocabulary: tokens; ``positions``: the longest text in tokens; ``types``: segments of a text.
    """

    layers: int
    width: int
    heads: int
    hidden: int
    vocabulary: int = 30522
    positions: int = 512
    types: int = 2


VARIANTS = {"minilm_l6": Variant(6, 384, 12, 1536), "bert_base": Variant(12, 768, 12, 3072)}

_norm = partial(nnx.LayerNorm, epsilon=EPSILON, use_fast_variance=False)
_dropout = partial(nnx.Dropout, DROPOUT, deterministic=True)


class Embeddings(nnx.Module):
    """Word, position and segment embeddings, summed and normalised: ``[B, T] -> [B, T, width]``."""

    def __init__(self, variant: Variant, *, rngs: nnx.Rngs):
        self.word = nnx.Embed(variant.vocabulary, variant.width, rngs=rngs)
        self.position = nnx.Embed(variant.positions, variant.width, rngs=rngs)
        self.token_type = nnx.Embed(variant.types, variant.width, rngs=rngs)
        self.norm = _norm(variant.width, rngs=rngs)
        self.dropout = _dropout(rngs=rngs)

    def __call__(self, tokens: jax.Array, types: jax.Array | None) -> jax.Array:
        x = self.word(tokens) + self.position.embedding[...][: tokens.shape[1]]
        x = x + (self.token_type.embedding[...][0] if types is None else self.token_type(types))
        return self.dropout(self.norm(x))


class Attention(nnx.Module):
    """Multi-head self-attention: ``[B, T, width] -> [B, T, width]``; masked tokens are not looked at."""

    def __init__(self, variant: Variant, *, rngs: nnx.Rngs):
        dense = partial(nnx.Linear, variant.width, variant.width, rngs=rngs)
        self.heads = variant.heads
        self.query, self.key, self.value, self.out = dense(), dense(), dense(), dense()
        self.dropout = _dropout(rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        apart = lambda y: y.reshape(*y.shape[:2], self.heads, -1)
        query, key, value = (apart(layer(x)) for layer in (self.query, self.key, self.value))
        logits = jnp.einsum("btnd,bsnd->bnts", query, key) / jnp.sqrt(jnp.asarray(query.shape[-1], x.dtype))
        if mask is not None:
            logits = jnp.where(mask[:, None, None, :] != 0, logits, jnp.finfo(logits.dtype).min)
        weights = self.dropout(jax.nn.softmax(logits, axis=-1))
        return self.out(jnp.einsum("bnts,bsnd->btnd", weights, value).reshape(x.shape))


class MLP(nnx.Module):
    """Two dense layers with the exact (erf) GELU between them."""

    def __init__(self, variant: Variant, *, rngs: nnx.Rngs):
        self.up = nnx.Linear(variant.width, variant.hidden, rngs=rngs)
        self.down = nnx.Linear(variant.hidden, variant.width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x), approximate=False))


class Layer(nnx.Module):
    """A transformer block with the normalisation behind each residual sum (post-LN)."""

    def __init__(self, variant: Variant, *, rngs: nnx.Rngs):
        self.attention = Attention(variant, rngs=rngs)
        self.attention_norm = _norm(variant.width, rngs=rngs)
        self.mlp = MLP(variant, rngs=rngs)
        self.mlp_norm = _norm(variant.width, rngs=rngs)
        self.dropout = _dropout(rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        x = self.attention_norm(x + self.dropout(self.attention(x, mask)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class Bert(nnx.Module):
    """BERT: token embeddings, post-LN transformer blocks, and what is commonly read from them.

    Built in inference mode: every dropout is off, until ``Model.apply(..., train=...)`` says otherwise.

    Args:
      variant: one of ``VARIANTS.values()``.
      num_classes: outputs of a dense layer on the pooled first token; 0: none, the outputs are a dict.
      rngs: the streams of initialisation, ``params`` and ``dropout``.

    >>> variant = Variant(layers=1, width=8, heads=2, hidden=16, vocabulary=10)
    >>> outputs = Bert(variant, 0, rngs=nnx.Rngs(0))(jnp.array([[1, 2, 3]]))
    >>> {name: array.shape for name, array in outputs.items()}
    {'last_hidden_state': (1, 3, 8), 'pooled': (1, 8), 'embedding': (1, 8)}

    Source: Devlin et al., arXiv:1810.04805; Wang et al., "MiniLM", arXiv:2002.10957; the embedding is that of
    sentence-transformers (Reimers and Gurevych, arXiv:1908.10084).
    """

    def __init__(self, variant: Variant, num_classes: int, *, rngs: nnx.Rngs):
        self.positions = variant.positions
        self.embeddings = Embeddings(variant, rngs=rngs)
        self.layers = nnx.List([Layer(variant, rngs=rngs) for _ in range(variant.layers)])
        self.pooler = nnx.Linear(variant.width, variant.width, rngs=rngs)
        self.classifies = num_classes > 0
        if self.classifies:
            self.dropout = _dropout(rngs=rngs)
            self.head = nnx.Linear(variant.width, num_classes, rngs=rngs)

    def __call__(
        self, input_ids: jax.Array, attention_mask: jax.Array | None = None, token_type_ids: jax.Array | None = None
    ) -> Any:
        """What tokens mean.

        Args:
          input_ids: ``[B, T]`` integers.
          attention_mask: ``[B, T]``, 0 where there is padding; ``None``: nowhere.
          token_type_ids: ``[B, T]`` integers, the segment of each token; ``None``: all 0.

        Returns:
          With classes: logits ``[B, num_classes]``. Without: ``last_hidden_state [B, T, width]``, ``pooled [B, width]``
          (dense layer and tanh on the first token) and ``embedding [B, width]`` (mean over the tokens, of length 1).
        """
        self._check(input_ids)
        x = self.embeddings(input_ids, token_type_ids)
        for layer in self.layers:
            x = layer(x, attention_mask)
        pooled = jnp.tanh(self.pooler(x[:, 0]))
        if self.classifies:
            return self.head(self.dropout(pooled))
        return {"last_hidden_state": x, "pooled": pooled, "embedding": sentence_embedding(x, attention_mask)}

    def _check(self, tokens: Any) -> None:
        write = "transferjax.data.tokenizer(path)(texts) makes them"
        if jnp.ndim(tokens) != 2 or not jnp.issubdtype(jnp.result_type(tokens), jnp.integer):
            raise TransferError(f"BERT expects input_ids [B, T] of integers, got {describe(tokens)}: {write}.")
        if tokens.shape[1] > self.positions:
            raise TransferError(
                f"BERT has {self.positions} positions, got texts of {tokens.shape[1]} tokens. Cut them: "
                f"transferjax.data.tokenizer(path, max_length={self.positions})."
            )


def sentence_embedding(hidden: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The mean of ``[B, T, width]`` over the tokens that are no padding, scaled to length 1: ``[B, width]``.

    >>> print(sentence_embedding(jnp.array([[[3.0, 4.0], [9.0, 9.0]]]), jnp.array([[1, 0]])).round(3))
    [[0.6 0.8]]
    """
    weights = jnp.ones(hidden.shape[:2], hidden.dtype) if mask is None else mask.astype(hidden.dtype)
    total = jnp.einsum("btd,bt->bd", hidden, weights)
    mean = total / jnp.maximum(weights.sum(1, keepdims=True), LEAST_TOKENS)
    # The root of a clamped sum, not a clamped norm: the gradient at zero is zero, not NaN.
    return mean / jnp.sqrt(jnp.maximum(jnp.sum(mean**2, axis=1, keepdims=True), 1e-24))


def build(variant: Variant, num_classes: int, image_size: int | None = None) -> Bert:
    """The module, to be traced."""
    return Bert(variant, num_classes, rngs=nnx.Rngs(0))


def std(path: str, shape: tuple[int, ...]) -> float | None:
    """Kernels and embeddings are normal with standard deviation 0.02, as in the BERT reference."""
    return STD if path.endswith(("/kernel", "/embedding")) else None


def stages(variant: Variant) -> list[str]:
    """Globs from input to output."""
    layers = [f"layers/{i}/**" for i in range(variant.layers)]
    return ["embeddings/**", *layers, "{pooler,head}/**"]
