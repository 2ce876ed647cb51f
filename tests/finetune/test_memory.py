"""Whether a step fits, and what makes it fit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax.finetune._memory import fit_memory
from transferjax.program import measure, predict_memory

WIDTH, LAYERS = 64, 4
shape = jax.ShapeDtypeStruct


def layered(params, extra, x, *, key=None, train=False):
    for n in range(LAYERS):
        x = jnp.tanh(x @ params[f"layer{n}"]["kernel"] + params[f"layer{n}"]["bias"])
    return x @ params["head"]["kernel"], extra


def scanned(params, extra, x, *, key=None, train=False):
    turn = lambda x, w: (x + jnp.tanh(jax.nn.gelu(x @ w["up"]) @ w["down"]), None)
    return jax.lax.scan(turn, x, params["layers"])[0] @ params["head"], extra


DENSE = {"kernel": shape((WIDTH, WIDTH), "float32"), "bias": shape((WIDTH,), "float32")}
LAYERED = {**{f"layer{n}": DENSE for n in range(LAYERS)}, "head": {"kernel": shape((WIDTH, 4), "float32")}}
SCANNED = {
    "layers": {"up": shape((LAYERS, WIDTH, 256), "float32"), "down": shape((LAYERS, 256, WIDTH), "float32")},
    "head": shape((WIDTH, 4), "float32"),
}


def batch_of(count):
    return {"inputs": shape((count, WIDTH), "float32"), "labels": shape((count,), "int32")}


def make(apply, shapes, tuning, **options):
    """A step with its state and frozen tree, all of shapes."""
    model, tx = tj.Model(apply, None, shapes, {}), optax.adam(1e-3)
    first = lambda params: tj.init(jax.random.key(0), model._replace(params=params), tuning, tx)
    step = tj.make_step(tj.objectives.cross_entropy(apply), tuning, tx, **options)
    return (step, *jax.eval_shape(first, shapes))


def by_option(report):
    return {row["option"]: row for row in report.to_dicts()}


@pytest.fixture(scope="module")
def head():
    return make(layered, LAYERED, tj.train("head/**"))


def test_what_fits_is_said_and_nothing_is_divided(head):
    report = fit_memory(*head, batch_of(256), 2**30)
    assert report.columns == ("option", "predicted bytes", "temporary bytes", "fits")
    rows = by_option(report)
    assert list(rows) == ["as it is", "accumulate=2", "bfloat16 base", "int8 base", "hoisting"]
    assert all(report.column("fits")) and report.metadata["fits"] == ", ".join(rows)
    assert report.metadata["examples"] == 256 and report.metadata["device bytes"] == 2**30
    assert "remat_scans is left out: the loss has no scan" in report.metadata["notes"]
    assert "largest batch that fits as it is" not in report.metadata


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the rules are those of the CPU backend")
def test_the_prediction_is_that_of_the_compiled_step(head):
    step, state, frozen = head
    row = by_option(fit_memory(*head, batch_of(192), 2**30))["as it is"]
    found = measure(step.jitted.lower(step.objective, state, frozen, batch_of(192), True).compile())
    whole = found.argument_bytes + found.output_bytes - found.alias_bytes + found.temporary_bytes
    assert row["predicted bytes"] == pytest.approx(whole, rel=0.05)


def test_the_options_are_the_steps_that_they_name(head):
    step, state, frozen = head
    rows = by_option(fit_memory(*head, batch_of(256), 2**30))
    peak = lambda step, frozen: (
        predict_memory(step.jitted.trace(step.objective, state, frozen, batch_of(256), True)).peak_bytes
    )
    half = tj.make_step(step.objective, step.tuning, step.tx, accumulate=2)
    assert rows["accumulate=2"]["predicted bytes"] == peak(half, frozen)
    narrow = jax.tree.map(lambda leaf: shape(leaf.shape, jnp.bfloat16), frozen)
    assert rows["bfloat16 base"]["predicted bytes"] == peak(step, narrow)
    tuning = tj.tuning.quantise("layer*/kernel", "int8", step.tuning)
    codes = make(layered, LAYERED, tuning)[2]
    assert rows["int8 base"]["predicted bytes"] == peak(tj.make_step(step.objective, tuning, step.tx), codes)


def test_hoisting_is_judged_by_its_larger_part(head):
    report = fit_memory(*head, batch_of(512), 2**30)
    hoisted = tj.hoist(*head, batch_of(512))
    step, state, frozen = head
    traced = hoisted.prefix.jitted.trace(frozen, state.extra, step.objective, batch_of(512))
    assert by_option(report)["hoisting"]["predicted bytes"] == predict_memory(traced).peak_bytes
    assert "hoisting: the pass that is done once takes" in report.metadata["notes"]


def test_accumulation_is_doubled_until_it_fits():
    case = make(layered, LAYERED, tj.full())
    rows = by_option(fit_memory(*case, batch_of(4096), 3_600_000))
    parts = [name for name in rows if name.startswith("accumulate")]
    assert parts == ["accumulate=2", "accumulate=4", "accumulate=8"]
    assert [rows[name]["fits"] for name in parts] == [False, False, True]
    assert not rows["as it is"]["fits"]


def test_a_step_that_accumulates_already_goes_on_from_there():
    case = make(layered, LAYERED, tj.full(), accumulate=3)
    names = [name for name in by_option(fit_memory(*case, batch_of(24), 1)) if name.startswith("accumulate")]
    assert names == ["accumulate=6", "accumulate=12", "accumulate=24"]


def test_remat_is_judged_inside_scans():
    case = make(scanned, SCANNED, tj.full())
    rows = by_option(fit_memory(*case, batch_of(1024), 2**30))
    assert rows["remat_scans"]["predicted bytes"] < 0.6 * rows["as it is"]["predicted bytes"]


def test_a_tuning_that_freezes_nothing_leaves_the_base_alone():
    report = fit_memory(*make(scanned, SCANNED, tj.full()), batch_of(32), 2**30)
    assert not {"bfloat16 base", "int8 base", "hoisting"} & set(by_option(report))
    for said in (
        "bfloat16 base is left out: no frozen leaf is float32.",
        "int8 base is left out: no frozen leaf is a floating-point matrix.",
        "hoisting is left out: nothing is hoisted",
    ):
        assert said in report.metadata["notes"]


def test_a_quantised_base_is_not_quantised_again():
    case = make(layered, LAYERED, tj.tuning.quantise("layer*/kernel", "int8", tj.train("head/**")))
    rows = by_option(fit_memory(*case, batch_of(64), 2**30))
    assert "int8 base" not in rows and "bfloat16 base" in rows


def test_where_nothing_fits_the_largest_batch_is_named():
    step, state, frozen = make(layered, LAYERED, tj.full())
    size = lambda count: by_option(fit_memory(step, state, frozen, batch_of(count), 2**40))["as it is"]
    limit = size(37)["predicted bytes"]
    report = fit_memory(step, state, frozen, batch_of(1021), limit)  # a prime cannot be divided
    assert report.metadata["fits"] == "nothing"
    assert report.metadata["largest batch that fits as it is"] == 37
    assert fit_memory(step, state, frozen, batch_of(3), 1000).metadata["largest batch that fits as it is"] == 0


def test_one_example_cannot_be_divided(head):
    notes = fit_memory(*head, batch_of(1), 2**30).metadata["notes"]
    assert "accumulate is left out: a part would have no example." in notes


def test_arrays_do_as_well_as_shapes_and_are_not_donated(head):
    step, _, _ = head
    arrays = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), LAYERED)
    arrays = {name: jax.tree.map(lambda leaf: leaf + 0, value) for name, value in arrays.items()}
    state, frozen = tj.init(jax.random.key(0), tj.Model(layered, None, arrays, {}), step.tuning, step.tx)
    batch = {"inputs": np.zeros((32, WIDTH), np.float32), "labels": np.zeros(32, np.int32)}
    assert fit_memory(step, state, frozen, batch, 2**30).rows == fit_memory(*head, batch_of(32), 2**30).rows
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_a_network_larger_than_this_machine():
    wide = 200_000
    shapes = jax.tree.map(lambda leaf: shape([wide if n == WIDTH else n for n in leaf.shape], leaf.dtype), LAYERED)
    batch = {"inputs": shape((8, wide), "float32"), "labels": shape((8,), "int32")}
    report = fit_memory(*make(layered, shapes, tj.train("head/**")), batch, 80 * 2**30)
    assert by_option(report)["as it is"]["predicted bytes"] > 4 * wide**2 * LAYERS
    assert report.metadata["fits"] == "nothing" or not by_option(report)["as it is"]["fits"]


def test_the_platform_asked_for_is_judged(head):
    assert fit_memory(*head, batch_of(16), 2**30, platform="tpu").metadata["platform"] == "tpu"


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "16GB", None])
def test_device_bytes_that_are_none(head, wrong):
    with pytest.raises(tj.TransferError, match=r"device_bytes as a positive integer.*16 \* 2\*\*30 for 16 GiB"):
        fit_memory(*head, batch_of(4), wrong)


def test_wrong_arguments_say_what_to_write(head):
    step, state, frozen = head
    with pytest.raises(tj.TransferError, match=r"expects a Step first, got .*write tj.make_step"):
        fit_memory(lambda: None, state, frozen, batch_of(4), 1)
    with pytest.raises(tj.DataError, match="expected a dict with inputs and labels"):
        fit_memory(step, state, frozen, (1, 2), 1)
    with pytest.raises(tj.TransferError, match=r"expects a FinetuneState first.*swapped"):
        fit_memory(step, frozen, state, batch_of(4), 1)
