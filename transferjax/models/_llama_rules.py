"""Where the leaves of a Llama lie in Hugging Face files, and in trees whose layers are scanned or not."""

from __future__ import annotations

import re

from transferjax import surgery
from transferjax.models._llama import Variant

_LAYER = {
    "input_layernorm": "attention_norm/scale",
    "self_attn.q_proj": "attention/query/kernel",
    "self_attn.k_proj": "attention/key/kernel",
    "self_attn.v_proj": "attention/value/kernel",
    "self_attn.o_proj": "attention/out/kernel",
    "post_attention_layernorm": "mlp_norm/scale",
    "mlp.gate_proj": "mlp/gate/kernel",
    "mlp.up_proj": "mlp/up/kernel",
    "mlp.down_proj": "mlp/down/kernel",
}
_MODEL = r"(?:model\.)?"
_STACKED = (0, 2, 1)
"""From [layers, out, in] to [layers, in, out]; ``torch_layout`` would take three axes for a convolution's."""


def huggingface(variant: Variant, file_classes: int, num_classes: int) -> tuple[surgery.Rule, ...]:
    r"""Rules for a file of transformers' ``LlamaForCausalLM`` or ``LlamaModel``, in any float dtype.

    A tied file may repeat the embedding as ``lm_head.weight``, which is then waived. With classes, the layer that
    predicts the next token is waived and the classifier fresh.

    Args:
      variant: of the file and of the target, whose layers are stacked when it is scanned.
      file_classes: outputs of the file's classifier: it has none.
      num_classes: outputs of the target's.

    Returns:
      Rules for ``transferjax.surgery.plan``.

    >>> huggingface(Variant(2, 8, 2, 1, 16, 10, 6, scanned=True), 0, 0)[1]
    stack(r'(?:model\.)?layers\.(?P<i>\d+)\.input_layernorm\.weight', 'layers/attention_norm/scale', axis=0)
    """
    layers = [(rf"{_MODEL}layers\.(?P<i>\d+)\.{re.escape(theirs)}\.weight", ours) for theirs, ours in _LAYER.items()]
    if variant.scanned:
        renamed = [surgery.stack(theirs, f"layers/{ours}") for theirs, ours in layers]
    else:
        renamed = [surgery.rename(theirs, rf"layers/\g<i>/{ours}") for theirs, ours in layers]
    return (
        surgery.rename(rf"{_MODEL}embed_tokens\.weight", "embed/embedding"),
        *renamed,
        surgery.permute("layers/**/kernel", _STACKED) if variant.scanned else surgery.torch_layout("layers/**/kernel"),
        surgery.rename(rf"{_MODEL}norm\.weight", "norm/scale"),
        *_output(variant, num_classes),
        surgery.waive("*rotary_emb.inv_freq", optional=True),
        surgery.cast("**"),
    )


def unrolled(variant: Variant, file_classes: int, num_classes: int) -> tuple[surgery.Rule, ...]:
    """Rules for a tree of this library with ``layers/0``, ``layers/1``, ... and the same head as the target."""
    return (surgery.stack(r"layers/(?P<i>\d+)/(.*)", r"layers/\2"),) if variant.scanned else ()


def scanned(variant: Variant, file_classes: int, num_classes: int) -> tuple[surgery.Rule, ...]:
    """Rules for a tree of this library with one ``layers`` of stacked leaves and the same head as the target."""
    return () if variant.scanned else (surgery.unstack(r"layers/(.*)", r"layers/{i}/\1"),)


def _output(variant: Variant, num_classes: int) -> tuple[surgery.Rule, ...]:
    if num_classes:
        return (surgery.waive("lm_head.weight", optional=True), surgery.fresh("head/**"))
    if variant.tied:
        return (surgery.waive("lm_head.weight", optional=True),)
    return (surgery.rename(r"lm_head\.weight", "lm_head/kernel"), surgery.torch_layout("lm_head/kernel"))
