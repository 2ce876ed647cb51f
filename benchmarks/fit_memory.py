"""How near the memory that is predicted from a jaxpr comes to what XLA says of the compiled program.

EfficientNet-Lite0 (everything, the head, LoRA), MiniLM-L6 (everything, LoRA), ViT-Ti, ResNet-18, TinyLlama with its
layers in a scan, and a scanned transformer with and without rematerialisation, most at two batch sizes. Both figures
are of the whole step: arguments, results that reuse none of them, and temporaries; the ratio of the temporaries alone
stands beside. No array is made. With ``--check`` it exits with 1 when a prediction is off by more than a tenth;
``--only lite0`` takes the rows whose name holds a word.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import transferjax as tj
from transferjax.program import measure, predict_memory

LIMIT = 0.1
CLASSES = 10
shape = jax.ShapeDtypeStruct


def of_model(name, tuning, batch, **options):
    """A step of a zoo model on shapes: ``(step, state, frozen, batch)``."""
    parts = []

    def first(key):
        model = tj.models.create(name, key=key, **options)
        parts.append(model.apply)
        return tj.init(key, model, tuning, optax.adamw(1e-3))

    state, frozen = jax.eval_shape(first, jax.random.key(0))
    return tj.make_step(tj.objectives.cross_entropy(parts[0]), tuning, optax.adamw(1e-3)), state, frozen, batch


def pictures(count, size):
    return {"inputs": shape((count, size, size, 3), jnp.float32), "labels": shape((count,), jnp.int32)}


def texts(count, tokens):
    return {"inputs": {"input_ids": shape((count, tokens), jnp.int32)}, "labels": shape((count,), jnp.int32)}


def block(x, p, heads=4):
    """One layer of a transformer: ``[B, T, D] -> [B, T, D]``."""
    norm = lambda x: (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)
    query, key, value = ((norm(x) @ p[n]).reshape(*x.shape[:2], heads, -1) for n in ("query", "key", "value"))
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", query, key) * query.shape[-1] ** -0.5)
    x = x + jnp.einsum("bhts,bshd->bthd", weights, value).reshape(x.shape) @ p["out"]
    return x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"], None


def scanned(count, remat, layers=10, tokens=80, width=160):
    """A transformer whose layers are one scan."""
    body = jax.checkpoint(block) if remat else block

    def apply(params, extra, x, *, key=None, train=False):
        return jax.lax.scan(body, x, params["blocks"])[0].mean(1) @ params["head"], extra

    inner = {name: (width, width) for name in ("query", "key", "value", "out")}
    inner |= {"up": (width, 4 * width), "down": (4 * width, width)}
    params = {
        "blocks": {name: shape((layers, *sizes), jnp.float32) for name, sizes in inner.items()},
        "head": shape((width, CLASSES), jnp.float32),
    }
    model, tuning, tx = tj.Model(apply, None, params, {}), tj.full(), optax.adamw(1e-3)
    first = lambda params: tj.init(jax.random.key(0), model._replace(params=params), tuning, tx)
    state, frozen = jax.eval_shape(first, params)
    batch = {"inputs": shape((count, tokens, width), jnp.float32), "labels": shape((count,), jnp.int32)}
    return tj.make_step(tj.objectives.cross_entropy(apply), tuning, tx), state, frozen, batch


def cases():
    """Every case by name."""
    lora = lambda pattern: tj.lora(pattern, rank=8)
    found = {}
    for count in (12, 24):
        lite = partial(of_model, "efficientnet_lite0", batch=pictures(count, 128), num_classes=CLASSES)
        found[f"lite0 full, {count}"] = partial(lite, tj.full())
        found[f"lite0 head, {count}"] = partial(lite, tj.train("head/fc/**"))
        found[f"lite0 lora, {count}"] = partial(lite, lora("blocks/*/expand/**/kernel"))
    for count in (6, 20):
        mini = partial(of_model, "minilm_l6", batch=texts(count, 48), num_classes=2)
        found[f"minilm full, {count}"] = partial(mini, tj.full())
        found[f"minilm lora, {count}"] = partial(mini, lora("layers/*/attention/{query,value}/kernel"))
    vit = partial(of_model, "vit_tiny_patch16_224", num_classes=CLASSES)
    found["vit lora, 6"] = partial(vit, lora("blocks/*/attention/{query,value}/kernel"), pictures(6, 224))
    resnet = partial(of_model, "resnet18", num_classes=CLASSES)
    found["resnet18 full, 6"] = partial(resnet, tj.full(), pictures(6, 160))
    tinyllama = partial(of_model, "tinyllama_1_1b_scanned", num_classes=2)
    found["tinyllama norms, 3"] = partial(tinyllama, tj.norm_only(), texts(3, 96))
    for count in (12, 24):
        for remat in (False, True):
            name = f"scanned transformer{' with remat' if remat else ''}, {count}"
            found[name] = partial(scanned, count, remat)
    return found


def row(name, case):
    step, state, frozen, batch = case()
    traced = step.jitted.trace(step.objective, state, frozen, batch, True)
    begin = time.perf_counter()
    ours = predict_memory(traced)
    seconds = time.perf_counter() - begin
    theirs: Any = measure(traced.lower().compile())
    total = theirs.argument_bytes + theirs.output_bytes - theirs.alias_bytes + theirs.temporary_bytes
    ratio = ours.peak_bytes / total
    temporaries = ours.temporary_bytes / theirs.temporary_bytes
    return name, ours.peak_bytes, total, ratio, temporaries, seconds, abs(ratio - 1) <= LIMIT


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 when a prediction is off by more than a tenth"
    )
    parser.add_argument("--only", default="", help="a word in the names of the cases to take")
    arguments = parser.parse_args()
    rows = tuple(row(name, case) for name, case in cases().items() if arguments.only in name)
    columns = ("step, examples", "predicted", "compiled", "ratio", "temporaries", "seconds", "met")
    report = tj.Report("Memory of a step, bytes", columns, rows, {"limit": LIMIT, "platform": jax.default_backend()})
    print(report)
    return int(arguments.check and not all(report.column("met")))


if __name__ == "__main__":
    sys.exit(main())
