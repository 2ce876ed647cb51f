"""How long ``align`` takes to find the rules of a BERT-base, and how that grows with the number of leaves.

Run ``python benchmarks/align.py``; with ``--check`` it exits with 1 when a figure is missed. The source is the names
and shapes of a Hugging Face ``BertModel`` in sorted order, as safetensors files have them; the target is the zoo's
model, abstract. The first call compiles the assignment and is told apart from the median of the following ones. Run it
on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import jax
import numpy as np

import transferjax as tj

SECONDS, GROWTH = 2.0, 2.0
LAYERS, MANY = 12, 72


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, np.dtype("float32"))


def source(layers, width=768, hidden=3072):
    """Names and shapes of a ``BertModel``: 199 leaves for 12 layers."""
    out = {f"embeddings.{name}_embeddings.weight": leaf(rows, width) for name, rows in
           (("word", 30522), ("position", 512), ("token_type", 2))}  # fmt: skip
    dense = {f"attention.self.{name}": (width, width) for name in ("query", "key", "value")}
    dense |= {
        "attention.output.dense": (width, width),
        "intermediate.dense": (hidden, width),
        "output.dense": (width, hidden),
    }
    modules = {f"encoder.layer.{i}.{name}": shape for i in range(layers) for name, shape in dense.items()}
    norms = [f"encoder.layer.{i}.{name}.LayerNorm" for i in range(layers) for name in ("attention.output", "output")]
    for name, shape in (modules | {"pooler.dense": (width, width)}).items():
        out |= {f"{name}.weight": leaf(*shape), f"{name}.bias": leaf(shape[0])}
    for name in (*norms, "embeddings.LayerNorm"):
        out |= {f"{name}.weight": leaf(width), f"{name}.bias": leaf(width)}
    return dict(sorted(out.items()))


def target(layers):
    """The abstract leaves of the zoo's BERT, of any number of layers."""
    model = jax.eval_shape(lambda key: tj.models.create("bert_base", key=key).params, jax.random.key(0))
    layer = model["layers"]["0"]
    return {**model, "layers": {str(i): layer for i in range(layers)}}


def seconds(layers, repeats):
    """Number of leaves, seconds of the first call, and the median of the following ones; the rules are checked."""
    file, model = source(layers), target(layers)
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        rules, _ = tj.surgery.align(file, model)
        times.append(time.perf_counter() - begin)
    expected = tj.surgery.plan(file, model, *tj.models.rules("bert_base", "huggingface"))
    assert tj.surgery.plan(file, model, *rules).moves == expected.moves
    return len(file), times[0], statistics.median(times[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 when a figure is missed")
    parser.add_argument("--repeats", type=int, default=5, help="calls after the first")
    arguments = parser.parse_args()
    few, first, median = seconds(LAYERS, arguments.repeats)
    many, _, longer = seconds(MANY, arguments.repeats)
    growth = (longer / many) / (median / few)
    rows = (
        (f"align, {few:,} leaves, first call (seconds)", first, SECONDS, first <= SECONDS),
        (f"align, {few:,} leaves (seconds)", median, SECONDS, median <= SECONDS),
        (f"align, {many:,} leaves (seconds)", longer, None, None),
        (f"seconds per leaf, {many:,} / {few:,} leaves", growth, GROWTH, growth <= GROWTH),
    )
    print(tj.Report("Align", ("quantity", "value", "at most", "met"), rows, {"repeats": arguments.repeats}))
    return int(arguments.check and any(row[-1] is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
