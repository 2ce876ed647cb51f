"""Llama's decoder-only transformer in Flax NNX: Llama 3.2 1B and TinyLlama 1.1B, with layers unrolled or scanned."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from transferjax._errors import TransferError, describe
from transferjax.models._bert import sentence_embedding
from transferjax.models._initialise import shape_rngs

STD = 0.02


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How Llama 3 stretches the slow rotations of RoPE to longer texts.

    Attributes:
      factor: slow rotations are this many times slower.
      low, high: rotations of fewer than ``low`` turns over the original positions are slow, of more than ``high``
        fast (left as they are); between the two, the frequency is interpolated.
      positions: the longest text, in tokens, before the stretching.
    """

    factor: float = 32.0
    low: float = 1.0
    high: float = 4.0
    positions: int = 8192


@dataclasses.dataclass(frozen=True)
class Variant:
    """The sizes of one decoder.

    Attributes:
      layers: transformer blocks.
      width: features of a token.
      heads: of the queries; ``kv_heads``: of the keys and values, each read by ``heads / kv_heads`` of the queries.
      hidden: features inside of a block's MLP.
      vocabulary: tokens; ``positions``: the longest text in tokens.
      head_width: features of a head; ``None``: ``width / heads``.
      theta: base of RoPE's frequencies; ``scaling``: how they are stretched, or ``None``.
      epsilon: added to the mean square in every RMSNorm.
      tied: whether the embedding is the output layer too.
      scanned: whether the layers are one, run by ``scan``, whose leaves have a leading axis ``[layers]``.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int
    positions: int
    head_width: int | None = None
    theta: float = 10_000.0
    scaling: Scaling | None = None
    epsilon: float = 1e-5
    tied: bool = False
    scanned: bool = False

    @property
    def features(self) -> int:
        """Of one head.

        >>> VARIANTS["llama3_2_1b"].features
        64
        """
        return self.width // self.heads if self.head_width is None else self.head_width


_UNROLLED = {
    "llama3_2_1b": Variant(16, 2048, 32, 8, 8192, 128_256, 131_072, theta=500_000.0, scaling=Scaling(), tied=True),
    "tinyllama_1_1b": Variant(22, 2048, 32, 4, 5632, 32_000, 2048),
}
VARIANTS = {
    **_UNROLLED,
    **{f"{name}_scanned": dataclasses.replace(variant, scanned=True) for name, variant in _UNROLLED.items()},
}


def frequencies(variant: Variant) -> np.ndarray:
    """RoPE's rotation per position, in radians: float32 ``[features / 2]``, from fast to slow.

    >>> tiny = Variant(1, 16, 2, 1, 32, 100, 64)
    >>> print(frequencies(tiny))
    [1.    0.1   0.01  0.001]

    Source: Su et al., arXiv:2104.09864; the stretching is that of Llama 3.1 (``rope_type`` "llama3" in transformers).
    """
    size = variant.features
    found = 1.0 / variant.theta ** (np.arange(0, size, 2) / size)
    if variant.scaling is not None:
        by = variant.scaling
        turns = by.positions * found / (2 * math.pi)
        fast = np.clip((turns - by.low) / (by.high - by.low), 0.0, 1.0)
        found = found * (fast + (1.0 - fast) / by.factor)
    return found.astype(np.float32)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary position embedding of ``[B, T, heads, features]``; feature ``i`` turns with feature ``i + features / 2``.

    Args:
      x: queries or keys.
      cos: ``[T, features / 2]``, of position times frequency.
      sin: as ``cos``.

    Returns:
      As ``x``.

    >>> quarter = jnp.full((1, 1), jnp.pi / 2)
    >>> print(rotate(jnp.array([[[[1.0, 0.0]]]]), jnp.cos(quarter), jnp.sin(quarter)).round(3) + 0.0)
    [[[[0. 1.]]]]
    """
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention, grouped queries: ``[B, T, width] -> [B, T, width]``; masked tokens are not looked at."""

    def __init__(self, variant: Variant, *, rngs: nnx.Rngs):
        dense = partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.features = variant.features
        wide, narrow = variant.heads * self.features, variant.kv_heads * self.features
        self.query = dense(variant.width, wide)
        self.key, self.value = dense(variant.width, narrow), dense(variant.width, narrow)
        self.out = dense(wide, variant.width)

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array, mask: jax.Array | None) -> jax.Array:
        apart = lambda y: y.reshape(*y.shape[:2], -1, self.features)
        query, key, value = (apart(layer(x)) for layer in (self.query, self.key, self.value))
        looked_at = None if mask is None else mask[:, None, None, :] != 0
        found = jax.nn.dot_product_attention(
            rotate(query, cos, sin), rotate(key, cos, sin), value, mask=looked_at, is_causal=True
        )
        return self.out(found.reshape(*x.shape[:2], -1))


class MLP(nnx.Module):
    """SwiGLU: a dense layer, gated by another through SiLU, and a dense layer back."""

    def __init__(self, variant: Variant, *, rngs: nnx.Rngs):
        dense = partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.gate, self.up = dense(variant.width, variant.hidden), dense(variant.width, variant.hidden)
        self.down = dense(variant.hidden, variant.width)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """A transformer block: attention and MLP, each on normalised tokens and added to what came."""

    def __init__(self, variant: Variant, *, rngs: nnx.Rngs):
        self.attention_norm = _norm(variant, rngs)
        self.attention = Attention(variant, rngs=rngs)
        self.mlp_norm = _norm(variant, rngs)
        self.mlp = MLP(variant, rngs=rngs)

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array, mask: jax.Array | None) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        return x + self.mlp(self.mlp_norm(x))


def _norm(variant: Variant, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(variant.width, epsilon=variant.epsilon, rngs=rngs)


class Llama(nnx.Module):
    """Llama: token embedding, pre-RMSNorm blocks with rotary positions, and a layer that predicts the next token.

    Args:
      variant: one of ``VARIANTS.values()``, or any other.
      num_classes: outputs of a dense layer on the last token, in place of the next token's; 0: none, the outputs are a
        dict.
      rngs: the streams of initialisation, ``params``.

    Raises:
      TransferError: the heads contradict the width or each other.

    >>> variant = Variant(layers=1, width=8, heads=2, kv_heads=1, hidden=16, vocabulary=10, positions=6)
    >>> outputs = jax.eval_shape(lambda: Llama(variant, 0, rngs=nnx.Rngs(0))(jnp.array([[1, 2, 3]])))
    >>> {name: array.shape for name, array in outputs.items()}
    {'embedding': (1, 8), 'last_hidden_state': (1, 3, 8), 'logits': (1, 3, 10), 'pooled': (1, 8)}

    Source: Touvron et al., "LLaMA", arXiv:2302.13971; Dubey et al., "The Llama 3 Herd of Models", arXiv:2407.21783;
    Zhang et al., "TinyLlama", arXiv:2401.02385. It computes what ``LlamaForCausalLM`` of transformers computes.
    """

    def __init__(self, variant: Variant, num_classes: int, *, rngs: nnx.Rngs):
        _check_sizes(variant)
        self.variant, self.classifies = variant, num_classes > 0
        self.embed = nnx.Embed(variant.vocabulary, variant.width, rngs=rngs)
        self.layers: Any = _stacked(variant, rngs) if variant.scanned else _apart(variant, rngs)
        self.norm = _norm(variant, rngs)
        if self.classifies:
            self.head = nnx.Linear(variant.width, num_classes, rngs=rngs)
        elif not variant.tied:
            self.lm_head = nnx.Linear(variant.width, variant.vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array | None = None) -> Any:
        """What comes next, and what the text means so far.

        Args:
          input_ids: ``[B, T]`` integers.
          attention_mask: ``[B, T]``, 0 where there is padding, on either side; ``None``: nowhere.

        Returns:
          With classes: logits ``[B, num_classes]``. Without: ``last_hidden_state [B, T, width]`` (normalised),
          ``logits [B, T, vocabulary]`` of the token after each, ``pooled [B, width]`` (the last token that is no
          padding) and ``embedding [B, width]`` (mean over the tokens, of length 1).
        """
        self._check(input_ids)
        angles = jnp.arange(input_ids.shape[1], dtype=jnp.float32)[:, None] * frequencies(self.variant)
        x = self._through(self.embed(input_ids), jnp.cos(angles), jnp.sin(angles), attention_mask)
        x = self.norm(x)
        pooled = last_token(x, attention_mask)
        if self.classifies:
            return self.head(pooled)
        logits = self.embed.attend(x) if self.variant.tied else self.lm_head(x)
        embedding = sentence_embedding(x, attention_mask)
        return {"last_hidden_state": x, "logits": logits, "pooled": pooled, "embedding": embedding}

    def _through(self, x: jax.Array, cos: jax.Array, sin: jax.Array, mask: jax.Array | None) -> jax.Array:
        if self.variant.scanned:
            run = lambda layer, x: layer(x, cos, sin, mask)
            return nnx.scan(run, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return x

    def _check(self, tokens: Any) -> None:
        if jnp.ndim(tokens) != 2 or not jnp.issubdtype(jnp.result_type(tokens), jnp.integer):
            raise TransferError(
                f"Llama expects input_ids [B, T] of integers, got {describe(tokens)}: "
                "transferjax.data.tokenizer(path)(texts) makes them."
            )
        if tokens.shape[1] > self.variant.positions:
            raise TransferError(
                f"this Llama has {self.variant.positions} positions, got texts of {tokens.shape[1]} tokens. Cut them: "
                f"transferjax.data.tokenizer(path, max_length={self.variant.positions})."
            )


def _apart(variant: Variant, rngs: nnx.Rngs) -> nnx.List:
    return nnx.List([Layer(variant, rngs=rngs) for _ in range(variant.layers)])


def _stacked(variant: Variant, rngs: nnx.Rngs) -> Layer:
    make = lambda key: Layer(variant, rngs=nnx.Rngs(key))
    return nnx.vmap(make)(jax.random.split(rngs.params(), variant.layers))


def last_token(hidden: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The last of ``[B, T, width]`` that is no padding: ``[B, width]``; of a text of padding alone, the last.

    >>> print(last_token(jnp.array([[[1.0], [2.0], [3.0]]]), jnp.array([[1, 1, 0]])))
    [[2.]]
    """
    if mask is None:
        return hidden[:, -1]
    last = hidden.shape[1] - 1 - jnp.argmax(mask[:, ::-1] != 0, axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def build(variant: Variant, num_classes: int, image_size: int | None = None) -> Llama:
    """The module, to be traced for its shapes."""
    return Llama(variant, num_classes, rngs=shape_rngs())


def std(path: str, shape: tuple[int, ...]) -> float | None:
    """Kernels and embeddings are normal with standard deviation 0.02, as in transformers; scales start at one."""
    return STD if path.endswith(("/kernel", "/embedding")) else None


def stages(variant: Variant) -> list[str]:
    """Globs from input to output; scanned layers are one stage."""
    layers = ["layers/**"] if variant.scanned else [f"layers/{i}/**" for i in range(variant.layers)]
    return ["embed/**", *layers, "{norm,lm_head,head}/**"]


def _check_sizes(variant: Variant) -> None:
    if variant.head_width is None and variant.width % variant.heads:
        raise TransferError(
            f"{variant.heads} heads do not divide a width of {variant.width}. Write heads=... that divides it, or "
            "head_width=..."
        )
    if variant.heads % variant.kv_heads:
        raise TransferError(
            f"{variant.kv_heads} key and value heads do not divide {variant.heads} query heads. Write kv_heads=... "
            "that divides them."
        )
    if variant.features % 2:
        raise TransferError(
            f"heads of {variant.features} features cannot be rotated in pairs. Write an even head_width=..."
        )
