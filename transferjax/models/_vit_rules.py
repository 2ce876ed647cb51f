"""Where the leaves of a Vision Transformer lie in the files of timm and of transformers."""

from __future__ import annotations

import re

from transferjax import surgery
from transferjax.models._vit import Variant

_NORM = {"weight": "scale", "bias": "bias"}
_DENSE = {"weight": "kernel", "bias": "bias"}
_LEAF = "(weight|bias)"
_QKV = ("query", "key", "value")
_HF_DENSE = {"attention.output": "attention/out", "intermediate": "mlp/up", "output": "mlp/down"}
_HF_NORMS = {"before": "norm1", "after": "norm2"}


def timm(variant: Variant, file_classes: int, num_classes: int) -> tuple[surgery.Rule, ...]:
    r"""Rules for a file of timm's ``VisionTransformer``.

    Its one weight ``[3 * width, width]`` of query, key and value is cut in three; positions of another image size are
    resized. The classifier is taken when both numbers of classes agree; otherwise the file's is waived, and the
    target's, where it has one, is fresh.

    >>> timm(Variant(16, 192, 12, 3), 1000, 10)[0]
    rename(r'patch_embed\.proj\.(weight|bias)', patch)
    """
    return (
        surgery.rename(rf"patch_embed\.proj\.{_LEAF}", patch),
        *_tokens(variant, "cls_token", "pos_embed"),
        surgery.rename(rf"blocks\.(\d+)\.norm([12])\.{_LEAF}", timm_norm),
        *(
            surgery.split(
                rf"blocks\.(\d+)\.attn\.qkv\.{leaf}", [rf"blocks/\1/attention/{part}/{ours}" for part in _QKV], axis=0
            )
            for leaf, ours in _DENSE.items()
        ),
        surgery.rename(rf"blocks\.(\d+)\.attn\.proj\.{_LEAF}", timm_out),
        surgery.rename(rf"blocks\.(\d+)\.mlp\.fc([12])\.{_LEAF}", timm_mlp),
        surgery.rename(rf"(?:fc_)?norm\.{_LEAF}", last_norm),
        surgery.torch_layout("**/kernel"),
        *_classifier("head", file_classes, num_classes),
    )


def huggingface(variant: Variant, file_classes: int, num_classes: int) -> tuple[surgery.Rule, ...]:
    r"""Rules for a file of transformers' ``ViTForImageClassification`` or ``ViTModel``.

    Positions and classifier as for :func:`timm`; the dense layer that ``ViTModel`` may add behind the class token is
    waived.

    >>> huggingface(Variant(16, 192, 12, 3), 1000, 10)[-1]
    fresh('head/fc/**')
    """
    layer = r"(?:vit\.)?encoder\.layer\.(\d+)"
    return (
        surgery.rename(rf"(?:vit\.)?embeddings\.patch_embeddings\.projection\.{_LEAF}", patch),
        *_tokens(variant, r"(?:vit\.)?embeddings\.cls_token", r"(?:vit\.)?embeddings\.position_embeddings"),
        surgery.rename(rf"{layer}\.layernorm_(before|after)\.{_LEAF}", hf_norm),
        surgery.rename(rf"{layer}\.attention\.attention\.({'|'.join(_QKV)})\.{_LEAF}", hf_projection),
        surgery.rename(rf"{layer}\.(attention\.output|intermediate|output)\.dense\.{_LEAF}", hf_dense),
        surgery.rename(rf"(?:vit\.)?layernorm\.{_LEAF}", last_norm),
        surgery.torch_layout("**/kernel"),
        surgery.waive("*pooler.dense.*", optional=True),
        *_classifier("classifier", file_classes, num_classes),
    )


def _tokens(variant: Variant, class_token: str, position: str) -> tuple[surgery.Rule, ...]:
    rules: list[surgery.Rule] = [surgery.rename(position, "embeddings/position")]
    if variant.class_token:
        rules.append(surgery.rename(class_token, "embeddings/class_token"))
    if variant.registers:
        rules.append(surgery.rename("reg_token", "embeddings/registers"))
    prefix = variant.prefix if variant.prefix_positions else 0
    return (*rules, surgery.adapt("embeddings/position", "position_embedding", prefix=prefix))


def _classifier(name: str, file_classes: int, num_classes: int) -> tuple[surgery.Rule, ...]:
    if num_classes == file_classes:
        return (surgery.rename(rf"{name}\.{_LEAF}", classifier),)
    waived = surgery.waive(f"{name}.*", optional=True)
    return (waived, surgery.fresh("head/fc/**")) if num_classes else (waived,)


def patch(found: re.Match[str]) -> str:
    """The convolution that makes tokens of patches."""
    return f"embeddings/patch/{_DENSE[found[1]]}"


def last_norm(found: re.Match[str]) -> str:
    """The normalisation behind the blocks."""
    return f"norm/{_NORM[found[1]]}"


def classifier(found: re.Match[str]) -> str:
    """The last dense layer."""
    return f"head/fc/{_DENSE[found[1]]}"


def timm_norm(found: re.Match[str]) -> str:
    """The normalisation in front of attention (1) or MLP (2)."""
    return f"blocks/{found[1]}/norm{found[2]}/{_NORM[found[3]]}"


def timm_out(found: re.Match[str]) -> str:
    """The projection behind the heads."""
    return f"blocks/{found[1]}/attention/out/{_DENSE[found[2]]}"


def timm_mlp(found: re.Match[str]) -> str:
    """The two layers of the MLP."""
    return f"blocks/{found[1]}/mlp/{('up', 'down')[int(found[2]) - 1]}/{_DENSE[found[3]]}"


def hf_norm(found: re.Match[str]) -> str:
    """The normalisation in front of attention, or of the MLP."""
    return f"blocks/{found[1]}/{_HF_NORMS[found[2]]}/{_NORM[found[3]]}"


def hf_projection(found: re.Match[str]) -> str:
    """Query, key or value."""
    return f"blocks/{found[1]}/attention/{found[2]}/{_DENSE[found[3]]}"


def hf_dense(found: re.Match[str]) -> str:
    """The projection behind the heads, or a layer of the MLP."""
    return f"blocks/{found[1]}/{_HF_DENSE[found[2]]}/{_DENSE[found[3]]}"
