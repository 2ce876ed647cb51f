"""What `hoist` hands out: parts, cut, reasons, a step on residuals; and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax.finetune import hoist


@pytest.fixture(scope="module")
def setting(model, make_batches):
    """`setting(batch=None, apply=None, tuning=..., **options)`: step, state, frozen, batch and what is hoisted."""

    def make(batch=None, *, apply=None, tuning=None, objective=None, train=False, **options):
        batch = make_batches(1)[0] if batch is None else batch
        tuning = tj.train("head/**") if tuning is None else tuning
        own = model if apply is None else model._replace(apply=apply)
        step = tj.make_step(objective or tj.objectives.cross_entropy(own.apply), tuning, optax.sgd(0.1), train=train)
        state, frozen = tj.init(jax.random.key(0), own, tuning, step.tx)
        return step, state, frozen, batch, hoist(step, state, frozen, batch, **options)

    return make


def residual_of(step, state, frozen, batch, hoisted):
    return hoisted.prefix(frozen, state.extra, step.objective, batch)


def test_the_cut_is_the_hidden_layer(setting):
    _, _, frozen, batch, hoisted = made = setting()
    residual = residual_of(*made)
    assert {name: (one.shape, one.dtype) for name, one in hoisted.cut.items()} == {
        "labels": ((4,), jnp.int32),
        "hoisted_0": ((4, 4), jnp.float32),
    }
    np.testing.assert_array_equal(residual["labels"], batch["labels"])
    np.testing.assert_array_equal(residual["hoisted_0"], jax.jit(jnp.tanh)(batch["inputs"] @ frozen["stem"]["kernel"]))
    assert hoisted.bytes_per_example == 20
    assert repr(hoisted) == "Hoisted(20 bytes per example: labels, hoisted_0)"
    assert hoisted.reasons == (
        "what learns first meets the data in dot_general of (4, 4) float32 and (4, 2) float32 to (4, 2) float32 "
        "(after the use of 'stem/kernel'): head/kernel.",
        "the residual holds 20 bytes per example: labels (4,) int32, hoisted_0 (4, 4) float32.",
    )


def test_what_each_part_reads(setting):
    step, state, frozen, _, hoisted = made = setting()
    assert tj.paths(hoisted.keep(frozen)) == {}
    assert list(hoisted.reads(state, frozen)) == ["frozen/stem/kernel"]
    assert "dot_general" in str(hoisted.prefix_jaxpr())
    suffix = lambda frozen: hoisted.suffix(
        state.trainable, frozen, state.extra, step.objective, residual_of(*made), state.key
    )
    assert float(suffix(hoisted.keep(frozen)).value) == float(suffix(frozen).value)
    biases = setting(tuning=tj.bias_only())
    assert list(tj.paths(biases[-1].keep(biases[2]))) == [], "the kernels are behind the cut, before the only bias"
    stems = setting(tuning=tj.train("stem/**"))
    assert list(tj.paths(stems[-1].keep(stems[2]))) == ["head/bias", "head/kernel"]


def test_the_report_counts_both_parts(setting):
    *_, hoisted = setting()
    rows = dict(hoisted.report().rows)
    assert rows["bytes per example"] == 20
    assert rows["FLOPs of the prefix, once for these examples"] == 2 * 4 * 3 * 4
    assert 0 < rows["FLOPs of a hoisted step"] <= rows["FLOPs of the step as it was"] - 2 * 4 * 3 * 4
    assert "hoisted_0 (4, 4) float32" in str(hoisted.report())


def test_fit_takes_the_hoisted_step(setting, make_batches, bits):
    step, state, frozen, _, hoisted = setting()
    other = tj.copy(state)
    batches = make_batches(3)
    residuals = [residual_of(step, other, frozen, batch, hoisted) for batch in batches]
    *_, (late, metrics) = tj.fit(hoisted.step, other, hoisted.keep(frozen), residuals)
    *_, (whole, expected) = tj.fit(step, state, frozen, batches)
    assert bits(late) == bits(whole)
    assert {name: float(x) for name, x in metrics.items()} == {name: float(x) for name, x in expected.items()}


def test_other_batch_sizes_follow(setting, make_batches):
    step, state, frozen, _, hoisted = setting()
    for size in (1, 2, 7):
        batch = make_batches(1, size)[0]
        residual = residual_of(step, state, frozen, batch, hoisted)
        assert residual["hoisted_0"].shape == (size, 4)
        late = hoisted.suffix(state.trainable, frozen, state.extra, step.objective, residual, state.key)
        params = step.tuning.merge(state.trainable, frozen)
        np.testing.assert_allclose(late.value, step.objective(params, state.extra, batch, None, False).value, rtol=1e-6)


def test_extra_that_comes_back_unchanged_counts_as_frozen(setting, model):
    """`extra` shifts the hidden layer; where training changes it, the cut lies before."""

    def apply(params, extra, inputs, *, key=None, train=False):
        hidden = jnp.tanh(inputs @ params["stem"]["kernel"])
        new = extra if train is False else {"seen": extra["seen"] + 1.0}
        hidden = jnp.sum(hidden + extra["seen"], -1, keepdims=True)
        return hidden * params["head"]["bias"], new

    quiet = setting(apply=apply)[-1]
    assert {one.shape for one in quiet.cut.values()} == {(4,)}
    moving = setting(apply=apply, train=True)[-1]
    assert {one.shape for one in moving.cut.values()} == {(4, 4), (4,)}
    assert any("values that the step changes enter at add" in one and "seen" in one for one in moving.reasons)


def test_a_weight_of_the_examples_flows_to_the_suffix(setting, make_batches):
    batch = {**make_batches(1)[0], "weight": np.array([0.0, 1.0, 2.0, 3.0], np.float32)}
    step, state, frozen, _, hoisted = made = setting(batch)
    residual = residual_of(*made)
    assert set(residual) == {"labels", "weight", "hoisted_0"}
    late = hoisted.suffix(state.trainable, frozen, state.extra, step.objective, residual, state.key)
    assert {name: float(one) for name, one in late.weight.items()} == {"loss": 6.0, "accuracy": 6.0}


def test_an_entry_that_is_no_example_is_passed_on(setting, make_batches):
    def temper(apply, params, extra, batch, key, train):
        outputs, extra = apply(params, extra, batch["inputs"], key=key, train=train)
        return tj.Loss(jnp.mean(outputs**2) * batch["temperature"], {}, extra)

    batch = {**make_batches(1)[0], "temperature": np.float32(2.0)}
    apply = setting()[0].objective.args[0]
    step, state, frozen, _, hoisted = made = setting(batch, objective=jax.tree_util.Partial(temper, apply))
    residual = residual_of(*made)
    assert {name: one.shape for name, one in residual.items()} == {"temperature": (), "hoisted_0": (4, 4)}
    other = tj.copy(state)
    whole, late = step(state, frozen, batch)[1], hoisted.step(other, frozen, residual)[1]
    assert float(whole["loss"]) == float(late["loss"])


@pytest.mark.parametrize(("dtype", "size", "tolerance"), [("bfloat16", 12, 2**-8), ("int8", 12, 1 / 254)])
def test_residuals_of_other_types(setting, dtype, size, tolerance):
    step, state, frozen, batch, hoisted = made = setting(residual_dtype=dtype)
    exact, residual = residual_of(*setting()), residual_of(*made)
    assert hoisted.bytes_per_example == size
    assert residual["hoisted_0"].dtype == dtype and residual["labels"].dtype == jnp.int32
    stored = hoisted.suffix.loss.at(4, True).split.stored[-1]
    restored = hoisted.suffix.loss.decode(stored, residual)
    row = np.abs(exact["hoisted_0"]).max(-1, keepdims=True)
    assert restored.dtype == jnp.float32
    assert np.all(np.abs(restored - exact["hoisted_0"]) <= tolerance * row * 1.01)
    assert np.any(restored != exact["hoisted_0"])
    whole, late = step(tj.copy(state), frozen, batch)[1], hoisted.step(state, frozen, residual)[1]
    np.testing.assert_allclose(late["loss"], whole["loss"], rtol=0.02)


def test_a_row_of_zeros_stays_one_in_int8(setting, make_batches):
    batch = make_batches(1)[0]
    batch["inputs"][1] = 0.0
    *made, hoisted = setting(batch, residual_dtype="int8")
    residual = residual_of(*made, hoisted)
    restored = hoisted.suffix.loss.decode(hoisted.suffix.loss.at(4, True).split.stored[-1], residual)
    np.testing.assert_array_equal(restored[1], np.zeros(4))


def test_when_nothing_can_be_hoisted_the_reasons_say_so(setting, make_batches):
    full = setting(tuning=tj.full())[-1]
    assert set(full.cut) == {"inputs", "labels"}
    assert full.reasons[0] == "nothing is hoisted: no product, reduction or loop may be early."
    assert "what learns first meets the data in dot_general" in full.reasons[1] and "stem/kernel" in full.reasons[1]
    alone = setting(make_batches(1, 1)[0])[-1]
    assert set(alone.cut) == {"inputs", "labels"}
    assert alone.reasons[1].startswith("a batch of one example does not show where the examples are: hoist with")


def test_efficientnet_lite0_with_its_head_alone():
    model = tj.models.create("efficientnet_lite0", num_classes=10, key=jax.random.key(0))
    tuning, tx = tj.train("head/fc/**"), optax.sgd(0.1)
    step = tj.make_step(tj.objectives.cross_entropy(model.apply), tuning, tx)
    state, frozen = tj.init(jax.random.key(1), model, tuning, tx)
    batch = {"inputs": jnp.zeros((2, 96, 96, 3)), "labels": jnp.zeros(2, int), "id": jnp.arange(2)}
    assert tj.hoist(step, state, frozen, batch).bytes_per_example == 4 * 1280 + 4


def test_what_is_no_step_or_type(setting):
    step, state, frozen, batch, _ = setting()
    with pytest.raises(tj.TransferError, match=r"hoist\(\) expects a Step first, got function: write tj.make_step"):
        hoist(lambda: None, state, frozen, batch)
    with pytest.raises(
        tj.TransferError, match="expects residual_dtype to be one of float32, bfloat16, int8, got 'fp8'"
    ):
        hoist(step, state, frozen, batch, residual_dtype="fp8")
    with pytest.raises(tj.DataError, match="the batch is a list; expected a dict"):
        hoist(step, state, frozen, [batch])


def test_leaves_that_are_missing_or_of_another_shape(setting):
    step, state, frozen, batch, hoisted = made = setting()
    with pytest.raises(tj.TransferError, match="the prefix reads 'stem/kernel' of frozen, which is not there"):
        hoisted.prefix({}, state.extra, step.objective, batch)
    wide = {**frozen, "stem": {"kernel": jnp.ones((3, 5))}}
    message = r"the prefix expects 'stem/kernel' of frozen to be \(3, 4\) float32, got \(3, 5\) float32"
    with pytest.raises(tj.TransferError, match=message):
        hoisted.prefix(wide, state.extra, step.objective, batch)
    with pytest.raises(tj.DataError, match="the prefix reads 'labels' of batch, which is not there"):
        hoisted.prefix(frozen, state.extra, step.objective, {"inputs": batch["inputs"]})
    residual = residual_of(*made)
    message = r"the suffix expects 'hoisted_0' of the residual to be \(4, 4\) float32, got nothing: pass what"
    with pytest.raises(tj.DataError, match=message):
        hoisted.step(tj.copy(state), frozen, {"labels": residual["labels"]})
    residual["hoisted_0"] = residual["hoisted_0"].astype(jnp.bfloat16)
    with pytest.raises(tj.DataError, match=r"to be \(4, 4\) float32, got \(4, 4\) bfloat16"):
        hoisted.step(tj.copy(state), frozen, residual)


def test_a_state_of_another_tuning(setting):
    _, _, frozen, _, hoisted = made = setting()
    other = setting(tuning=tj.train("head/bias"))[1]
    with pytest.raises(tj.TransferError, match="the suffix reads 'head/kernel' of trainable, which is not there"):
        hoisted.step(other, frozen, residual_of(*made))


def test_a_program_that_is_another_at_another_batch_size(setting, model, make_batches):
    def apply(params, extra, inputs, *, key=None, train=False):
        hidden = jnp.tanh(inputs @ params["stem"]["kernel"])
        if len(inputs) != 4:
            hidden = hidden - hidden.mean(0)
        return jnp.square(hidden @ hidden.T)[:, :4] @ params["head"]["kernel"], extra

    made = setting(apply=apply)
    assert {one.shape for one in made[-1].cut.values()} == {(4, 4), (4,)}

    def product(params, extra, inputs, *, key=None, train=False):
        hidden = inputs @ params["stem"]["kernel"]
        hidden = hidden if len(inputs) == 4 else hidden[:, :3]
        return hidden @ params["head"]["kernel"][: hidden.shape[1]], extra

    step, state, frozen, _, hoisted = setting(apply=product)
    with pytest.raises(tj.DataError, match="for a batch of 6 examples the cut is another than for the 4 that hoist"):
        residual_of(step, state, frozen, make_batches(1, 6)[0], hoisted)


def test_parts_are_told_apart_by_themselves(setting):
    *_, hoisted = setting()
    assert hoisted.prefix == hoisted.prefix and hoisted.prefix != setting()[-1].prefix
    assert dataclasses.replace(hoisted, reasons=()).step is hoisted.step
