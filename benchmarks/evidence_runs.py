"""The runs of ``evidence.py``: networks and features once, then every strategy on every target."""

from __future__ import annotations

import functools
import json
import pathlib
import time

import jax
import numpy as np
import optax
from evidence import (
    BATCH,
    BUDGETS,
    KEPT_FOR_RATES,
    OUTPUTS,
    RATE_SEED,
    SEEDS,
    SIZE,
    STRATEGIES,
    TARGETS,
    TRIED,
    rate_of,
)
from evidence_data import Small, as_inputs, chosen, digits, half, load
from flax import nnx

import transferjax as tj

ZOO = {"lite0": "efficientnet_lite0", "lite2": "efficientnet_lite2", "minilm": "minilm_l6"}
LAYERS = {"lite0": "{stem,blocks/*}", "half": "{convolutions/*,body}", "minilm": "layers/*"}
AT_ONCE, TOKENS_WIDE = 250, 2048


@functools.cache
def small(folder: pathlib.Path, source: str):
    """One of the two small networks, trained once and kept in ``folder``."""
    path = folder / "kept" / f"{source}.npz"
    images, labels = half(folder) if source == "half" else digits()
    model = tj.interop.nnx(Small(int(labels.max()) + 1, nnx.Rngs(0)))
    whole = {"params": model.params, "extra": model.extra}
    leaves, form = jax.tree.flatten(whole)
    if not path.exists():
        model = _learnt(model, images, labels, 1600)
        path.parent.mkdir(exist_ok=True)
        np.savez(path, *jax.tree.leaves({"params": model.params, "extra": model.extra}))
    with np.load(path) as stored:
        return jax.tree.unflatten(form, [stored[f"arr_{n}"] for n in range(len(leaves))])


def _learnt(model, images, labels, steps):
    tuning, tx = tj.full(), optax.adam(tj.optim.warmup_cosine(2e-3, steps))
    step = tj.make_step(tj.objectives.cross_entropy(model.apply), tuning, tx)
    state, frozen = tj.init(jax.random.key(0), model, tuning, tx)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.integers(0, len(images), 64)
        state, _ = step(state, frozen, {"inputs": as_inputs(images[rows], "image"), "labels": labels[rows]})
    return model._replace(params=tuning.merge(state.trainable, frozen), extra=state.extra)


@functools.cache
def network(folder: pathlib.Path, source: str, outputs: int, seed: int = 0):
    """A source with a fresh head of ``outputs`` classes, or without one."""
    if source in ZOO:
        model, _ = tj.models.load(ZOO[source], num_classes=outputs, key=jax.random.key(seed))
        return model if source == "minilm" else tj.data.on_images(model, SIZE)
    fresh = tj.interop.nnx(Small(outputs, nnx.Rngs(seed)))
    if source == "none":
        return fresh
    held, kept = small(folder, source), {path: leaf for path, leaf in tj.paths(fresh.params).items() if "head" in path}
    flat = {**tj.paths(held["params"]), **kept}
    form = jax.tree.structure(fresh.params)
    leaves = [flat[path] for path in tj.paths(fresh.params)]
    return fresh._replace(params=jax.tree.unflatten(form, leaves), extra=held["extra"])


@functools.cache
def features(folder: pathlib.Path, data: str, source: str):
    """Features of a whole data set, with all layers where they are wanted; kept in ``folder``."""
    path = folder / "kept" / f"{data}-{source}.npz"
    if not path.exists():
        whole = load(folder, data)
        begin = time.perf_counter()
        if source == "raw":
            found = _raw(whole["inputs"])
        else:
            modality = "text" if source == "minilm" else "image"
            model = network(folder, source, 0)
            parts = np.array_split(np.arange(len(whole["labels"])), -(-len(whole["labels"]) // AT_ONCE))
            batches = [{"inputs": as_inputs(whole["inputs"][rows], modality), "id": rows} for rows in parts]
            found = tj.features.extract(model, batches, at=LAYERS.get(source)).arrays
        path.parent.mkdir(exist_ok=True)
        seconds = (time.perf_counter() - begin) / len(whole["labels"])
        np.savez(path, seconds=seconds, **{name.replace("/", "|"): array for name, array in found.items()})
    with np.load(path) as stored:
        held = {name.replace("|", "/"): stored[name] for name in stored.files if name != "seconds"}
    rows = len(next(iter(held.values())))
    names = [name for name in held if name not in ("outputs/last_hidden_state", "outputs/pooled")]
    return tj.features.FeatureTable({name: held[name] for name in names}, np.arange(rows))


def _raw(inputs):
    ids = np.arange(len(inputs))
    if inputs.dtype == np.uint8:
        return {"inputs": inputs.reshape(len(inputs), -1).astype(np.float32)}
    batch = {"inputs": {"input_ids": inputs[:, 0], "attention_mask": inputs[:, 1]}, "id": ids}
    return tj.features.bag_of_tokens([batch], width=TOKENS_WIDE).arrays


def prepare(folder: pathlib.Path) -> None:
    """Networks and features, each once."""
    for target in (*TARGETS, *KEPT_FOR_RATES):
        for source in dict.fromkeys(strategy.source for strategy in STRATEGIES if strategy.on(target)):
            if source != "none":
                table = features(folder, target.data, source)
                print(target.data, source, table, flush=True)


@functools.cache
def program(folder: pathlib.Path, source: str, tuning: str, optimizer: str):
    """One step for every target, rate and budget: the rate is a part of the optimizer's state."""
    model = network(folder, source, OUTPUTS)
    inject = optax.inject_hyperparams
    momentum = lambda learning_rate: optax.sgd(learning_rate, momentum=0.9)
    make = {"sgd": momentum, "rmsprop": optax.rmsprop, "adamw": optax.adamw}[optimizer]
    tx = optax.chain(optax.clip_by_global_norm(1.0), inject(make)(learning_rate=0.0))
    what = tj.full() if tuning == "full" else tj.last(int(tuning.split()[1]), tj.models.stages(ZOO[source]))
    forward = jax.jit(
        lambda state, frozen, inputs: model.apply(what.merge(state.trainable, frozen), state.extra, inputs)[0]
    )
    return what, tx, tj.make_step(tj.objectives.cross_entropy(model.apply), what, tx), forward


def finetuned(folder, target, strategy, steps, seed, rate):
    """The share of right answers after ``steps`` steps."""
    data = load(folder, target.data)
    train, test, labels = chosen(data, target, seed)
    tuning, tx, step, forward = program(folder, strategy.source, strategy.tuning, strategy.optimizer)
    state, frozen = tj.init(jax.random.key(seed), network(folder, strategy.source, OUTPUTS, seed), tuning, tx)
    schedule = tj.optim.warmup_cosine(rate, steps)
    rng, order, size = np.random.default_rng(seed), np.zeros(0, int), BATCH[target.modality]
    for number in range(steps):
        while len(order) < size:
            order = np.concatenate([order, rng.permutation(train)])
        rows, order = order[:size], order[size:]
        state.opt_state[1].hyperparams["learning_rate"] = np.float32(schedule(number))
        batch = {"inputs": as_inputs(data["inputs"][rows], target.modality), "labels": labels[rows]}
        state, _ = step(state, frozen, batch)
    right = 0
    for start in range(0, len(test), AT_ONCE):
        rows = test[start : start + AT_ONCE]
        filled = np.concatenate([rows, np.repeat(rows[-1:], AT_ONCE - len(rows))])
        logits = forward(state, frozen, as_inputs(data["inputs"][filled], target.modality))
        found = np.asarray(logits)[: len(rows), : labels.max() + 1]
        right += int((found.argmax(-1) == labels[rows]).sum())
    return right / len(test)


def read_out(folder, target, strategy, seed):
    """The share of right answers of a linear model on features."""
    train, test, labels = chosen(load(folder, target.data), target, seed)
    table = features(folder, target.data, strategy.source)
    names = list(table.arrays)
    if strategy.features == "all layers":
        part = table.take(train)
        found = tj.features.head2toe(part, labels[train])
        held = table.take(test).concatenated(names)
    else:
        logistic = functools.partial(tj.features.logistic, folds=3, tolerance=1e-5)
        fit = tj.features.ridge if strategy.optimizer == "closed form" else logistic
        found = fit(table[names[-1]][train], labels[train])
        held = table[names[-1]][test]
    return float((np.asarray(found.predict(found.params, held)).argmax(-1) == labels[test]).mean())


def rates(folder: pathlib.Path, part: tuple[int, int]) -> None:
    """Accuracies of every rate that was tried, at the long budget, on tasks that are no target."""
    for strategy in STRATEGIES[part[0] :: part[1]]:
        family = "small" if strategy.source == "half" else strategy.source
        for rate in TRIED.get((family, strategy.tuning, strategy.optimizer), ()):
            target = next(target for target in KEPT_FOR_RATES if strategy.on(target))
            found = finetuned(folder, target, strategy, BUDGETS["long"], RATE_SEED, rate)
            print(f"{strategy.name} {rate:g}: {found:.4f}", flush=True)


def run(folder: pathlib.Path, part: tuple[int, int]) -> None:
    """Every run that is not on record yet, each a line of ``runs-K.jsonl``."""
    path = folder / "kept" / f"runs-{part[0]}.jsonl"
    done = {_key(row) for file in path.parent.glob("runs-*.jsonl") for row in map(json.loads, file.open())}
    wanted = [
        (target, strategy, {"target": target.name, "strategy": strategy.name, "steps": steps, "seed": seed})
        for seed in SEEDS
        for target in TARGETS
        for strategy in STRATEGIES
        for steps in (strategy.steps() if strategy.on(target) else ())
    ]
    left = [found for found in wanted if _key(found[-1]) not in done]
    names = list(dict.fromkeys((row["target"], row["seed"]) for _, _, row in left))
    mine = set(names[part[0] :: part[1]])
    for target, strategy, row in left:
        if (row["target"], row["seed"]) in mine:
            seed, steps = row["seed"], row["steps"]
            begin = time.perf_counter()
            if steps:
                found = finetuned(folder, target, strategy, steps, seed, rate_of(strategy))
            else:
                found = read_out(folder, target, strategy, seed)
            row = {**row, "accuracy": found, "seconds": round(time.perf_counter() - begin, 2)}
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)


def _key(row) -> tuple:
    return row["target"], row["strategy"], row["steps"], row["seed"]
