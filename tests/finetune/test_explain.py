"""What a step costs beside the same step with everything trainable."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax.finetune._explain import everything_trainable, explain

BATCH = {"inputs": np.ones((16, 8), np.float32), "labels": np.zeros((16,), np.int32)}


def apply(params, extra, x, *, key=None, train=False):
    for name in ("a", "b", "c"):
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["head"]["kernel"], extra


def make(tuning, tx, **options):
    dense = {"kernel": jnp.ones((8, 8)) * 0.1, "bias": jnp.zeros(8)}
    params = {**{name: dict(dense) for name in "abc"}, "head": {"kernel": jnp.ones((8, 3))}}
    model = tj.Model(apply, None, tj.copy(params), {})
    step = tj.make_step(tj.objectives.cross_entropy(apply), tuning, tx, **options)
    return (step, *tj.init(jax.random.key(0), model, tuning, tx))


def by_name(report):
    return {row["quantity"]: row for row in report.to_dicts()}


def test_every_row_of_a_compiled_report():
    report = explain(*make(tj.train("head/**"), optax.adam(1e-3)), BATCH)
    rows = by_name(report)
    assert report.columns == ("quantity", "this step", "everything trainable", "ratio")
    assert list(rows) == [
        *("FLOPs", "FLOPs (XLA, a loop's body once)", "transcendental functions"),
        *("bytes accessed (unfused)", "bytes accessed (XLA, a loop's body once)"),
        *("temporary memory", "argument memory", "output memory", "output memory that reuses arguments"),
        *("code bytes", "compile seconds", "optimizer bytes"),
        *("trainable parameters", "frozen parameters", "frozen bytes"),
    ]
    assert rows["trainable parameters"]["this step"] == 24
    assert rows["trainable parameters"]["everything trainable"] == 24 + 3 * 72
    assert rows["frozen bytes"]["this step"] == 4 * 3 * 72 and rows["frozen bytes"]["everything trainable"] == 0
    assert rows["optimizer bytes"]["this step"] == 4 + 2 * 4 * 24
    assert rows["compile seconds"]["this step"] > 0
    assert 0.3 < rows["FLOPs"]["ratio"] < 0.5
    assert rows["output memory"]["ratio"] < 0.3
    assert report.metadata["merge-form adapters"] == "none"


def test_without_compiling_the_rows_that_only_xla_knows_are_left_out():
    rows = by_name(explain(*make(tj.train("head/**"), optax.adam(1e-3)), BATCH, compile=False))
    assert not {"compile seconds", "temporary memory", "code bytes"} & set(rows)
    assert rows["FLOPs"]["this step"] > 0


def test_everything_trainable_beside_itself_is_one():
    rows = by_name(explain(*make(tj.full(), optax.adam(1e-3)), BATCH, compile=False))
    assert {row["ratio"] for row in rows.values()} == {1.0, None}


def test_the_state_is_not_donated():
    step, state, frozen = make(tj.train("head/**"), optax.sgd(0.1))
    explain(step, state, frozen, BATCH, compile=False)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((state, frozen)))


def test_accumulation_is_counted_times_its_parts():
    one = by_name(explain(*make(tj.train("head/**"), optax.sgd(0.1)), BATCH, compile=False))
    four = by_name(explain(*make(tj.train("head/**"), optax.sgd(0.1), accumulate=4), BATCH, compile=False))
    assert four["FLOPs"]["this step"] == pytest.approx(one["FLOPs"]["this step"], rel=0.05)


def test_groups_of_the_optimizer_are_kept_and_said():
    tuning = tj.chain(head=tj.train("head/**"), lora=tj.lora("{a,b}/kernel", rank=2))
    report = explain(
        *make(tuning, tj.per_group(head=optax.sgd(0.1), lora=optax.adam(1e-3))),
        BATCH,
        compile=False,
    )
    assert report.metadata["optimizer of the reference"] == "that of group 'lora', for every parameter"
    assert report.metadata["merge-form adapters"] == "none"
    rows = by_name(report)
    assert rows["trainable parameters"]["everything trainable"] == 24 + 3 * 72
    assert rows["optimizer bytes"]["everything trainable"] == 4 + 2 * 4 * (24 + 3 * 72)


def test_an_optimizer_without_groups_takes_the_plain_tree():
    tuning = tj.chain(head=tj.train("head/**"), lora=tj.lora("a/kernel", rank=2))
    step, state, frozen = make(tuning, optax.sgd(0.1))
    (reference, abstract_state, stays), group = everything_trainable(step, state, frozen)
    assert group is None and sorted(abstract_state.trainable) == ["a", "b", "c", "head"]
    assert jax.tree.leaves(stays) == [] and reference.objective is step.objective


def test_integer_parameters_stay_frozen_in_the_reference():
    params = {"table": jnp.arange(3), "head": jnp.ones(3)}
    model = tj.Model(lambda p, e, x, *, key=None, train=False: (x * p["head"] + p["table"], e), None, params, {})
    tuning, tx = tj.train("head"), optax.sgd(0.1)
    step = tj.make_step(tj.objectives.mean_squared_error(model.apply), tuning, tx)
    state, frozen = tj.init(jax.random.key(0), model, tuning, tx)
    rows = by_name(explain(step, state, frozen, {"inputs": np.ones(3), "labels": np.ones(3)}, compile=False))
    assert rows["frozen parameters"]["everything trainable"] == 3


def test_notes_of_the_program_reach_the_report():
    def looping(params, extra, x, *, key=None, train=False):
        out, extra = apply(params, extra, x)
        return out + jax.lax.stop_gradient(jax.lax.while_loop(lambda v: v < 3.0, lambda v: v + 1.0, jnp.sum(x))), extra

    step, state, frozen = make(tj.train("head/**"), optax.sgd(0.1))
    step = tj.make_step(tj.objectives.cross_entropy(looping), step.tuning, step.tx)
    report = explain(step, state, frozen, BATCH, compile=False)
    assert "a while loop of unknown length is counted once" in report.metadata["notes"]


def test_an_optimizer_that_fits_no_tree_raises_its_own_error():
    step, state, frozen = make(tj.train("head/**"), optax.sgd(0.1))

    def init(params):
        raise ValueError("no tree is good enough")

    step = tj.make_step(step.objective, step.tuning, optax.GradientTransformation(init, optax.identity().update))
    with pytest.raises(ValueError, match="no tree is good enough"):
        explain(step, state, frozen, BATCH, compile=False)


def test_swapped_arguments_are_named():
    step, state, frozen = make(tj.train("head/**"), optax.adam(1e-3))
    with pytest.raises(tj.TransferError, match=r"explain\(\) expects a Step first, got FinetuneState: write tj\.make"):
        explain(state, step, frozen, BATCH)
    with pytest.raises(tj.TransferError, match=r"a step expects a FinetuneState first, got dict\. They are swapped"):
        explain(step, frozen, state, BATCH)
