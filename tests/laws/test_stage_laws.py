"""A leaf that begins to learn in a later stage moves as if it had an optimizer of its own from then on."""

import jax
import jax.numpy as jnp
import optax
import pytest

import transferjax as tj
from transferjax.testing._compare import require_same

STEPS = 3
ORDER = ["stem/**", "norm/**", "blocks/0/*", "blocks/1/*", "head/*"]


class OneOptimizerPerLeaf:
    """The reference: gradients of the whole loss, a clip over what learns, and one optax state for each leaf."""

    def __init__(self, objective, tx, clip=None):
        self.objective, self.tx, self.clip = objective, tx, clip
        self.leaves, self.states = {}, {}

    def begin(self, tuning, state, frozen):
        self.tuning, self.frozen, self.treedef = tuning, frozen, jax.tree.structure(state.trainable)
        self.train = tj.finetune.training_mode(tuning, state.trainable, frozen)
        begins = tj.paths(state.trainable)
        self.leaves = {path: self.leaves.get(path, jnp.copy(leaf)) for path, leaf in begins.items()}
        self.states = {path: self.states.get(path, self.tx(path).init(leaf)) for path, leaf in begins.items()}
        self.gradient = jax.jit(jax.grad(self._loss))

    def _loss(self, leaves, extra, batch, key):
        params = self.tuning.merge(jax.tree.unflatten(self.treedef, list(leaves.values())), self.frozen)
        return self.objective(params, extra, batch, key, self.train).value

    def step(self, state, batch):
        gradients = self.gradient(self.leaves, state.extra, batch, jax.random.fold_in(state.key, state.step))
        if self.clip is not None:
            norm = jnp.sqrt(sum(jnp.sum(g**2) for g in gradients.values()))
            gradients = {path: g * jnp.minimum(1.0, self.clip / norm) for path, g in gradients.items()}
        for path, leaf in self.leaves.items():
            update, self.states[path] = self.tx(path).update(gradients[path], self.states[path], leaf)
            self.leaves[path] = leaf + update


def follow(model, batch, tunings, transforms, reference):
    """Runs the stages, and compares every leaf with the reference after every step."""
    objective = tj.objectives.cross_entropy(model.apply)
    state, frozen = tj.init(jax.random.key(0), model, tunings[0], transforms[0])
    for number, (tuning, tx) in enumerate(zip(tunings, transforms, strict=True)):
        if number:
            old = tunings[number - 1]
            before = old.merge(state.trainable, frozen)
            state, frozen = tj.finetune.migrate(state, frozen, old, tuning, tx)
            require_same("the parameters stay", before, tuning.merge(state.trainable, frozen))
        step = tj.make_step(objective, tuning, tx)
        reference.begin(tuning, state, frozen)
        for _ in range(STEPS):
            reference.step(state, batch)
            state, _ = step(state, frozen, batch)
            found = tj.paths(state.trainable)
            require_same("step for step", reference.leaves, found, rtol=2e-5, atol=2e-6)
    assert int(state.step) == STEPS * len(tunings)
    return state, frozen


def _adam(path="", rate=0.05):
    return optax.adamw(optax.linear_schedule(rate, 0.0, 20), weight_decay=0.01)


@pytest.mark.parametrize(
    ("tx", "leaf", "clip"),
    [
        (tj.finetune.each_group(_adam()), _adam(), None),
        (optax.chain(optax.clip_by_global_norm(0.3), tj.finetune.each_group(_adam())), _adam(), 0.3),
        (tj.finetune.each_group(optax.MultiSteps(optax.adam(0.1), 2)), optax.MultiSteps(optax.adam(0.1), 2), None),
        (tj.optim.with_average(tj.finetune.each_group(optax.nadam(0.1))), optax.nadam(0.1), None),
        (tj.finetune.each_group(optax.lion(0.01)), optax.lion(0.01), None),
        (optax.sgd(0.1, momentum=0.9, nesterov=True), optax.sgd(0.1, momentum=0.9, nesterov=True), None),
        (tj.finetune.each_group(optax.yogi(0.05)), optax.yogi(0.05), None),
    ],
    ids=["adamw", "clip", "MultiSteps", "average", "lion", "momentum", "yogi"],
)
def test_gradual_unfreezing_is_one_optimizer_per_leaf(dict_model, batch, tx, leaf, clip):
    tunings = tj.finetune.unfreeze(ORDER, per_stage=2)
    reference = OneOptimizerPerLeaf(tj.objectives.cross_entropy(dict_model.apply), lambda path: leaf, clip)
    state, frozen = follow(dict_model, batch, tunings, [tx] * 3, reference)
    assert jax.tree.leaves(frozen) == []
    assert sorted(state.trainable) == ["stage_1", "stage_2", "stage_3"]


def test_linear_probing_then_fine_tuning_in_every_framework(model, batch):
    reference = OneOptimizerPerLeaf(tj.objectives.cross_entropy(model.apply), _adam)
    tx = tj.finetune.each_group(_adam())
    follow(model, batch, tj.finetune.lp_ft("head/**"), [tx, tx], reference)


def test_groups_with_optimizers_of_their_own(dict_model, batch):
    rates = {"head": optax.adam(0.1), "blocks": optax.sgd(0.1, momentum=0.9), "rest": optax.rmsprop(0.01)}
    parts = {"head": "head/**", "blocks": "blocks/**", "rest": tj.glob("stem/**") | "norm/**"}
    tunings, transforms = [], []
    for names in (["head"], ["head", "blocks"], ["head", "blocks", "rest"]):
        tunings.append(tj.chain(**{name: tj.train(parts[name]) for name in names}))
        transforms.append(tj.per_group(**{name: rates[name] for name in names}))
    reference = OneOptimizerPerLeaf(
        tj.objectives.cross_entropy(dict_model.apply), lambda path: rates[path.partition("/")[0]]
    )
    follow(dict_model, batch, tunings, transforms, reference)


def test_a_partition_by_labels_needs_no_groups(dict_model, batch):
    tunings = [tj.train("head/**"), tj.full()]
    labels = lambda tree: tj.label(tree, {"head": "head/**"}, default="body")
    transforms = [optax.partition({"head": _adam(), "body": _adam()}, labels), None]
    transforms[1] = transforms[0]
    reference = OneOptimizerPerLeaf(tj.objectives.cross_entropy(dict_model.apply), _adam)
    follow(dict_model, batch, tunings, transforms, reference)


def test_adapters_go_on_beside_what_begins(dict_model, batch):
    lora, head = tj.lora("blocks/*/kernel", 2), tj.train("head/**")
    more = {"lora": lora, "head": head, "stem": tj.lora("stem/kernel", 1)}
    tunings = [tj.chain(lora=lora), tj.chain(lora=lora, head=head), tj.chain(**more)]
    reference = OneOptimizerPerLeaf(tj.objectives.cross_entropy(dict_model.apply), _adam)
    _, frozen = follow(dict_model, batch, tunings, [tj.finetune.each_group(_adam())] * 3, reference)
    base = {"blocks": dict_model.params["blocks"], "norm": dict_model.params["norm"]}
    require_same("the base under an adapter", base, {name: frozen[name] for name in base})


def test_a_run_that_is_interrupted_in_a_stage_ends_with_the_same_bits(dict_model, batch, tmp_path):
    objective = tj.objectives.cross_entropy(dict_model.apply)
    tx = optax.chain(optax.clip_by_global_norm(1.0), tj.finetune.each_group(_adam()))

    def begin():
        tunings = tj.finetune.unfreeze(ORDER, per_stage=2)
        return [tj.finetune.Stage(tj.make_step(objective, tuning, tx), 2) for tuning in tunings]

    stages = begin()
    batches = [{**batch, "labels": (batch["labels"] + number) % 3} for number in range(6)]
    first = lambda: tj.init(jax.random.key(0), dict_model, stages[0].step.tuning, tx)
    *_, (_, whole, _, _) = tj.finetune.run_stages(stages, *first(), batches)
    run = tj.io.Run.create(tmp_path / "run", {})
    progress = tj.finetune.run_stages(stages, *first(), batches)
    for at, state, _, _ in progress:
        if at == (1, 1):
            run.save(state, "base")
            break
    stages = begin()
    like, frozen = tj.init(jax.random.key(0), dict_model, stages[1].step.tuning, tx)
    state, _ = run.restore(like, "base")
    assert int(state.step) == 3
    rest = list(tj.finetune.run_stages(stages, state, frozen, batches[3:], at=(1, 1)))
    assert [one.at for one in rest] == [(1, 2), (2, 1), (2, 2)]
    require_same("resume is exact", whole, rest[-1].state)
