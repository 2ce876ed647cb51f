"""What names say: the role of a leaf in its module, words in the field's standard terms, and numbers."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_DIMENSION = re.compile(r"(conv|norm|bn)[123]d", re.IGNORECASE)

WEIGHT, BIAS, MEAN, VARIANCE = "weight", "bias", "mean", "variance"
ROLES = {
    **dict.fromkeys(("weight", "weights", "kernel", "scale", "gamma", "embedding", "embeddings", "w", "g"), WEIGHT),
    **dict.fromkeys(("bias", "beta", "b"), BIAS),
    **dict.fromkeys(("mean", "running_mean", "moving_mean"), MEAN),
    **dict.fromkeys(("var", "variance", "running_var", "running_variance", "moving_var", "moving_variance"), VARIANCE),
}
"""The last words of a leaf's name, and what they say. In torch ``weight`` is also what Flax calls ``scale``."""

PHRASES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("in", "proj"): ("qkv",),
    ("c", "attn"): ("attention", "qkv"),
    ("feed", "forward"): ("mlp",),
    ("token", "type"): ("type",),
    ("post", "attention"): ("after",),  # what follows attention may be the norm before the MLP: no word of attention
    **{(kind, "norm"): ("norm",) for kind in ("layer", "batch", "group", "rms")},
    **{(dense, number): (to,) for dense in ("fc", "lin", "linear") for number, to in (("1", "up"), ("2", "down"))},
}
TERMS: dict[str, str] = {
    **dict.fromkeys(("attn", "mha", "sa", "attention"), "attention"),
    **dict.fromkeys(("ln", "bn", "gn", "layernorm", "batchnorm", "groupnorm", "rmsnorm", "norm"), "norm"),
    **dict.fromkeys(("conv", "convolution"), "conv"),
    **dict.fromkeys(("fc", "lin", "linear", "dense"), "dense"),
    **dict.fromkeys(("proj", "projection", "project"), "project"),
    **dict.fromkeys(("ffn", "ff", "intermediate", "mlp"), "mlp"),
    **dict.fromkeys(("emb", "embed", "embedding", "embeddings"), "embed"),
    **dict.fromkeys(("pos", "positional", "positions", "position", "wpe"), "position"),
    **dict.fromkeys(("wte", "word"), "word"),
    **dict.fromkeys(("tok", "tokens", "token"), "token"),
    **dict.fromkeys(("segment", "type"), "type"),
    **dict.fromkeys(("cls", "class"), "class"),
    **dict.fromkeys(("classifier", "logits", "prediction", "predictions", "head"), "head"),
    **dict.fromkeys(("shortcut", "skip", "downsample"), "downsample"),
    **dict.fromkeys(("dw", "depthwise"), "depthwise"),
    **dict.fromkeys(("q", "query"), "query"),
    **dict.fromkeys(("k", "key"), "key"),
    **dict.fromkeys(("v", "value"), "value"),
    **dict.fromkeys(("pre", "before"), "before"),
    **dict.fromkeys(("post", "after"), "after"),
    **dict.fromkeys(("o", "out", "output"), "out"),
}
SILENT = frozenset((
    "self", "layer", "layers", "block", "blocks", "stage", "stages", "module", "model", "backbone", "features", "net",
    "network", "c", "params", "state", "dict",
))  # fmt: skip
"""Words that every name may have and that tell no two leaves apart."""

WEAK = frozenset(("conv", "norm", "dense", "embed", "encoder", "token"))
"""Words that name the kind of a module rather than its place; they count less."""

ORDER = (
    "stem", "patch", "word", "position", "type", "before", "input", "attention", "query", "key", "value", "out",
    "after", "expand", "depthwise", "project", "mlp", "gate", "up", "down", "downsample", "head",
)  # fmt: skip
"""The order in which networks use what is called so, where names have no numbers."""

HEADS = frozenset(("head", "fc", "classifier", "logits", "predictions", "prediction", "pooler", "relationship"))
"""Words of the last layers, which may differ between source and target."""

BUFFERS = re.compile(
    r"(?:.*[./])?(num_batches_tracked|position_ids|token_type_ids|inv_freq|masked_bias|relative_position_index|"
    r"relative_coords_table|attn_mask|total_ops|total_params)"
)
"""Counters and constants that files keep among the weights."""


class Name(NamedTuple):
    """A leaf's name, read: its module's text, its role there, and the word that said so (empty: none did)."""

    module: str
    role: str
    said: str


@functools.lru_cache(maxsize=1 << 14)
def read(text: str) -> Name:
    """The module, the role and the word of a leaf.

    >>> read("attn.in_proj_weight")
    Name(module='attn.in_proj', role='weight', said='weight')
    >>> read("cls_token")
    Name(module='cls_token', role='weight', said='')
    """
    for count in (2, 1):
        found = re.fullmatch(rf"(?:(.*?)[./_]+)?({'_'.join([r'[A-Za-z]+'] * count)})", text)
        role = ROLES.get(found[2].lower()) if found else None
        if found and role:
            return Name((found[1] or "").strip("./_"), role, found[2].lower())
    return Name(text.strip("./_"), WEIGHT, "")


def words(text: str) -> tuple[frozenset[str], tuple[int, ...]]:
    """Standard terms and numbers of a name.

    >>> sorted(words("_blocks.3._bn0")[0]), words("_blocks.3._bn0")[1]
    (['norm'], (3, 0))
    >>> sorted(words("encoder.attention.self.query")[0])
    ['attention', 'encoder', 'query']
    """
    out: list[str] = []
    raw = [word.lower() for word in _WORD.findall(_DIMENSION.sub(r"\1", text))]
    while raw:
        phrase = tuple(raw[:2])
        out += PHRASES[phrase] if phrase in PHRASES else (str(TERMS.get(raw[0], raw[0])),)
        raw = raw[2:] if phrase in PHRASES else raw[1:]
    numbers = tuple(int(word) for word in out if word.isdecimal())
    terms = {word for word in out if not word.isdecimal()} - SILENT
    if "attention" in terms and "project" in terms:  # attn.proj is the output's, attn.q_proj the query's
        terms = terms - {"project"} | (set() if terms & {"query", "key", "value"} else {"out"})
    return frozenset(terms), numbers


def similarity(a: frozenset[str], b: frozenset[str]) -> float:
    """How many words two names share, of all they have; from 0 to 1.

    >>> similarity(frozenset({"query"}), frozenset({"query", "attention"}))
    0.5
    """
    weight = lambda terms: sum(0.3 if term in WEAK else 1.0 for term in terms)
    return weight(a & b) / weight(a | b) if a | b else 1.0


def usual_place(terms: frozenset[str]) -> tuple[int, ...]:
    """Where the field's order puts a module of these words; empty: nowhere."""
    return tuple(sorted(ORDER.index(term) for term in terms if term in ORDER))


@functools.lru_cache(maxsize=1 << 14)
def is_head(text: str) -> bool:
    """Whether a name is one of a last layer: what is in a numbered block is none.

    >>> is_head("head/fc"), is_head("classifier.6"), is_head("fc1"), is_head("blocks.3.fc")
    (True, True, False, False)
    """
    raw = [word.lower() for word in _WORD.findall(text)]
    before = list(itertools.takewhile(lambda word: not word.isdecimal(), raw))
    hidden = before[-1:] == ["fc"] and len(before) < len(raw)
    return bool(HEADS & set(before[:-1] if hidden else before))


def is_embedding(text: str) -> bool:
    """Whether the last part of a module's name says that it is a table of rows."""
    last = re.split(r"[./]", text)[-1]
    return bool({"embed", "word", "position", "type"} & words(last)[0]) and "patch" not in words(last)[0]


def natural_key(numbers: Sequence[str]) -> tuple[int, ...]:
    """Numbers, as they are written, in the order of their values."""
    return tuple(int(number) for number in numbers)
