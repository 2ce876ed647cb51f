"""Where the leaves of a BERT encoder lie in Hugging Face files: ``BertModel``, also inside of another as ``bert.``"""

from __future__ import annotations

import re

from transferjax import surgery

_EMBEDDINGS = {"word": "word", "position": "position", "token_type": "token_type"}
_NORM = {"weight": "scale", "bias": "bias", "gamma": "scale", "beta": "bias"}
_DENSE = {"weight": "kernel", "bias": "bias"}
_LAYER = r"(?:bert\.)?encoder\.layer\.(\d+)\."
_NORM_LEAF, _DENSE_LEAF = (rf"({'|'.join(leaves)})" for leaves in (_NORM, _DENSE))


def huggingface(variant: object, file_classes: int, num_classes: int) -> tuple[surgery.Rule, ...]:
    """Rules for a file without a classifier and a target of ``num_classes`` outputs, whose dense layer is fresh."""
    return (
        surgery.rename(r"(?:bert\.)?embeddings\.(word|position|token_type)_embeddings\.weight", embedding),
        surgery.rename(rf"(?:bert\.)?embeddings\.LayerNorm\.{_NORM_LEAF}", embedding_norm),
        surgery.rename(rf"{_LAYER}attention\.self\.(query|key|value)\.{_DENSE_LEAF}", attention),
        surgery.rename(rf"{_LAYER}attention\.output\.dense\.{_DENSE_LEAF}", attention_out),
        surgery.rename(rf"{_LAYER}(attention\.)?output\.LayerNorm\.{_NORM_LEAF}", norm),
        surgery.rename(rf"{_LAYER}(intermediate|output)\.dense\.{_DENSE_LEAF}", mlp),
        surgery.rename(rf"(?:bert\.)?pooler\.dense\.{_DENSE_LEAF}", pooler),
        surgery.torch_layout("**/kernel"),
        surgery.waive("*embeddings.position_ids", optional=True),
        *((surgery.fresh("head/**"),) if num_classes else ()),
    )


def embedding(found: re.Match[str]) -> str:
    """One of the three tables."""
    return f"embeddings/{_EMBEDDINGS[found[1]]}/embedding"


def embedding_norm(found: re.Match[str]) -> str:
    """The normalisation of their sum."""
    return f"embeddings/norm/{_NORM[found[1]]}"


def attention(found: re.Match[str]) -> str:
    """Query, key or value."""
    return f"layers/{found[1]}/attention/{found[2]}/{_DENSE[found[3]]}"


def attention_out(found: re.Match[str]) -> str:
    """The projection behind the heads."""
    return f"layers/{found[1]}/attention/out/{_DENSE[found[2]]}"


def norm(found: re.Match[str]) -> str:
    """The normalisation behind attention, or behind the MLP."""
    return f"layers/{found[1]}/{'attention' if found[2] else 'mlp'}_norm/{_NORM[found[3]]}"


def mlp(found: re.Match[str]) -> str:
    """The two layers of the MLP."""
    return f"layers/{found[1]}/mlp/{'up' if found[2] == 'intermediate' else 'down'}/{_DENSE[found[3]]}"


def pooler(found: re.Match[str]) -> str:
    """The dense layer on the first token."""
    return f"pooler/{_DENSE[found[1]]}"
