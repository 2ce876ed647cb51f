"""Vision Transformers in Flax NNX."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from transferjax._errors import TransferError, describe, is_whole
from transferjax._types import Preprocess
from transferjax.models._initialise import shape_rngs

STD = 0.02
POOLS = ("token", "mean")
MEAN = (0.5, 0.5, 0.5)
"""Mean and standard deviation of the pixels, as the published weights have them."""

_linear = partial(nnx.Linear, kernel_init=nnx.initializers.truncated_normal(STD))


@dataclasses.dataclass(frozen=True)
class Variant:
    """The sizes of one Vision Transformer.

    Attributes:
      patch: pixels of a side of a patch.
      width: features of every token.
      depth: number of blocks.
      heads: of each attention; they divide the width.
      mlp_ratio: hidden features of the MLP, as a factor on the width.
      size: pixels of a side of the image at which the weights were trained.
      class_token: whether a learned token stands in front of the patches.
      registers: number of further learned tokens, between the class token and the patches.
      prefix_positions: whether the position table has rows for the class token and the registers too.
      pool: ``"token"``, the class token after the last norm; ``"mean"``, the last norm of the mean over the patches.
      epsilon: added to the variance in every LayerNorm. timm's networks have 1e-6, which those of the zoo follow; most
        of transformers' have 1e-12. The difference is relative to the variance of the tokens.
    """

    patch: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    size: int = 224
    class_token: bool = True
    registers: int = 0
    prefix_positions: bool = True
    pool: str = "token"
    epsilon: float = 1e-6

    @property
    def prefix(self) -> int:
        """Number of tokens in front of the patches.

        >>> Variant(16, 192, 12, 3, registers=4).prefix
        5
        """
        return int(self.class_token) + self.registers


VARIANTS = {
    "vit_tiny_patch16_224": Variant(16, 192, 12, 3),
    "vit_small_patch16_224": Variant(16, 384, 12, 6),
    "vit_small_patch32_224": Variant(32, 384, 12, 6),
    "vit_base_patch8_224": Variant(8, 768, 12, 12),
    "vit_base_patch16_224": Variant(16, 768, 12, 12),
    "vit_base_patch32_224": Variant(32, 768, 12, 12),
    "vit_large_patch16_224": Variant(16, 1024, 24, 16),
}


def _norm(variant: Variant, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # Some features of trained networks are a hundred times larger than the others: E[x^2] - E[x]^2 would lose digits.
    return nnx.LayerNorm(variant.width, epsilon=variant.epsilon, use_fast_variance=False, rngs=rngs)


class Embeddings(nnx.Module):
    """Patches as tokens, behind the learned ones, with learned positions: ``[B, H, W, 3] -> [B, N, width]``."""

    def __init__(self, variant: Variant, size: int, *, rngs: nnx.Rngs):
        patch, init = (variant.patch, variant.patch), nnx.initializers.truncated_normal(STD)
        token = lambda count: nnx.Param(init(rngs.params(), (1, count, variant.width)))
        self.patch = nnx.Conv(3, variant.width, patch, strides=patch, padding="VALID", kernel_init=init, rngs=rngs)
        self.prefix_positions = variant.prefix_positions
        self.class_token = token(1) if variant.class_token else None
        self.registers = token(variant.registers) if variant.registers else None
        self.position = token((size // variant.patch) ** 2 + variant.prefix * variant.prefix_positions)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        x = self.patch(inputs)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        position = self.position[...]
        if not self.prefix_positions:
            x = x + position
        prefix = [one[...] for one in (self.class_token, self.registers) if one is not None]
        x = jnp.concatenate([*(jnp.broadcast_to(one, (x.shape[0], *one.shape[1:])) for one in prefix), x], axis=1)
        return x + position if self.prefix_positions else x


class Attention(nnx.Module):
    """Multi-head self-attention ``[B, N, width] -> [B, N, width]``; each kernel is one matrix ``[width, width]``."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        dense = partial(_linear, width, width, rngs=rngs)
        self.heads = heads
        self.query, self.key, self.value, self.out = dense(), dense(), dense(), dense()

    def __call__(self, x: jax.Array) -> jax.Array:
        apart = lambda y: y.reshape(*y.shape[:2], self.heads, -1)
        query, key, value = (apart(layer(x)) for layer in (self.query, self.key, self.value))
        return self.out(jax.nn.dot_product_attention(query, key, value).reshape(x.shape))


class Mlp(nnx.Module):
    """Two dense layers with the exact (erf) GELU between them."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.up = _linear(width, hidden, rngs=rngs)
        self.down = _linear(hidden, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x), approximate=False))


class Block(nnx.Module):
    """Attention and MLP, each on normalised tokens and added to what came (pre-LN)."""

    def __init__(self, variant: Variant, *, rngs: nnx.Rngs):
        self.norm1 = _norm(variant, rngs)
        self.attention = Attention(variant.width, variant.heads, rngs=rngs)
        self.norm2 = _norm(variant, rngs)
        self.mlp = Mlp(variant.width, int(variant.width * variant.mlp_ratio), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Head(nnx.Module):
    """The last dense layer; its kernel starts at zero."""

    def __init__(self, width: int, num_classes: int, *, rngs: nnx.Rngs):
        self.fc = nnx.Linear(width, num_classes, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc(x)


class ViT(nnx.Module):
    """Vision Transformer: patches as tokens, learned positions, pre-norm blocks.

    Args:
      variant: one of ``VARIANTS.values()``, or any other.
      num_classes: outputs of the last dense layer; 0 leaves it out.
      image_size: pixels of a side; the position table is made for it. Default: the variant's own size.
      rngs: the stream of initialisation, ``params``.

    Raises:
      TransferError: the patch does not divide the image, or the variant contradicts itself.

    >>> module = nnx.eval_shape(lambda: ViT(Variant(16, 32, 1, 2), 10, 96, rngs=nnx.Rngs(0)))
    >>> module.embeddings.position.shape, module.head.fc.kernel.shape
    ((1, 37, 32), (32, 10))

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv:2010.11929; registers: Darcet et al.,
    arXiv:2309.16588. Names and sizes as timm's ``VisionTransformer``.
    """

    def __init__(self, variant: Variant, num_classes: int, image_size: int | None = None, *, rngs: nnx.Rngs):
        size = variant.size if image_size is None else image_size
        _check(variant, size)
        self.size, self.prefix, self.pool = size, variant.prefix, variant.pool
        self.embeddings = Embeddings(variant, size, rngs=rngs)
        self.blocks = nnx.List([Block(variant, rngs=rngs) for _ in range(variant.depth)])
        self.norm = _norm(variant, rngs)
        self.classifies = num_classes > 0
        if self.classifies:
            self.head = Head(variant.width, num_classes, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Logits ``[B, num_classes]`` (or pooled features ``[B, width]``) of normalised images ``[B, H, W, 3]``."""
        expected = (self.size, self.size, 3)
        if jnp.ndim(inputs) != 4 or inputs.shape[1:] != expected:
            raise TransferError(
                f"this ViT expects images [B, {', '.join(map(str, expected))}], got {describe(inputs)}. Give a single "
                "image a batch axis, x[None]; transferjax.data.on_images(model) resizes, normalises and makes grey "
                "RGB; for images of another size build the network with image_size=..."
            )
        x = self.embeddings(inputs)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)[:, 0] if self.pool == "token" else self.norm(jnp.mean(x[:, self.prefix :], axis=1))
        return self.head(x) if self.classifies else x


def build(variant: Variant, num_classes: int, image_size: int | None = None) -> ViT:
    """The module, to be traced for its shapes."""
    return ViT(variant, num_classes, image_size, rngs=shape_rngs())


def std(path: str, shape: tuple[int, ...]) -> float | None:
    """Kernels, tokens and positions are normal with standard deviation 0.02; the classifier's kernel starts at zero."""
    drawn = path.endswith(("/kernel", "/class_token", "/registers", "/position"))
    return STD if drawn and not path.startswith("head/") else None


def stages(variant: Variant) -> list[str]:
    """Globs from input to output.

    >>> stages(Variant(16, 192, 2, 3))
    ['embeddings/**', 'blocks/0/**', 'blocks/1/**', '{norm,head}/**']
    """
    return ["embeddings/**", *(f"blocks/{i}/**" for i in range(variant.depth)), "{norm,head}/**"]


def preprocess(variant: Variant, image_size: int | None, class_names: tuple[str, ...]) -> Preprocess:
    """Bicubic, pixels from -1 to 1."""
    size = variant.size if image_size is None else image_size
    return Preprocess((size, size), MEAN, MEAN, "bicubic", class_names)


def _check(variant: Variant, size: int) -> None:
    if not is_whole(size) or size % variant.patch:
        near = max(1, round(size / variant.patch)) * variant.patch if is_whole(size) else variant.size
        raise TransferError(
            f"image_size is {size!r}, which patches of {variant.patch} pixels do not divide. "
            f"Write a multiple of {variant.patch}, such as image_size={near}."
        )
    if variant.width % variant.heads:
        raise TransferError(
            f"{variant.heads} heads do not divide a width of {variant.width}. Write heads=... that divides it."
        )
    if variant.pool not in POOLS or (variant.pool == "token" and not variant.class_token):
        has = "with" if variant.class_token else "without"
        raise TransferError(
            f"pool is {variant.pool!r} {has} a class token. Write pool='mean', or pool='token' with class_token=True."
        )
