"""Evaluation is exact and compiles once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj


@pytest.fixture(scope="module")
def start(model):
    return tj.init(jax.random.key(0), model, tj.train("head/**"), optax.sgd(0.1))


def cut(batch, *sizes):
    ends = np.cumsum(sizes)
    return [{name: value[end - size : end] for name, value in batch.items()} for end, size in zip(ends, sizes)]


@pytest.mark.parametrize("sizes", [(10,), (4, 4, 2), (4, 4, 1, 1), (2, 5, 3)])
@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_exact_however_the_examples_are_cut(sizes, weighted, model, start, make_batches):
    batch = make_batches(1, 10)[0]
    weight = np.linspace(0, 2, 10).astype(np.float32) if weighted else np.ones(10, np.float32)
    if weighted:
        batch["weight"] = weight
    metrics = {"accuracy": tj.objectives.accuracy, "loss": tj.objectives.negative_log_likelihood}
    found = tj.make_eval(model.apply, metrics, tj.train("head/**"))(*start, cut(batch, *sizes))
    outputs, _ = model.apply(model.params, model.extra, batch["inputs"])
    for name, metric in metrics.items():
        assert found[name] == pytest.approx(np.average(metric(outputs, batch), weights=weight), rel=1e-6)
        assert type(found[name]) is float


def test_it_compiles_once_and_takes_dicts_of_inputs(start, make_batches):
    traces = []

    def apply(params, extra, inputs, *, key=None, train=False):
        traces.append(train)
        return inputs["image"] @ params["stem"]["kernel"] @ params["head"]["kernel"], extra

    batch = make_batches(1, 10)[0]
    batches = [{**part, "inputs": {"image": part["inputs"]}} for part in cut(batch, 4, 4, 2)]
    evaluate = tj.make_eval(apply, {"accuracy": tj.objectives.accuracy}, tj.train("head/**"))
    first = evaluate(*start, iter(batches))
    assert evaluate(*start, batches) == first and traces == [False]
    outputs = (
        batch["inputs"] @ np.asarray(start[1]["stem"]["kernel"]) @ np.asarray(start[0].trainable["head"]["kernel"])
    )
    assert first["accuracy"] == pytest.approx((outputs.argmax(-1) == batch["labels"]).mean())


def test_it_leaves_the_state_alone(model, start, make_batches, bits):
    before = bits(start)
    tj.make_eval(model.apply, {"accuracy": tj.objectives.accuracy}, tj.train("head/**"))(*start, make_batches(2))
    assert bits(start) == before


def test_a_padded_example_counts_nothing_even_when_its_metric_is_not_finite(model, start, make_batches):
    batch = make_batches(1, 4)[0]
    batch["weight"] = np.array([1, 1, 1, 0], np.float32)
    batch["labels"][3] = 9
    found = tj.make_eval(model.apply, {"loss": tj.objectives.negative_log_likelihood}, tj.train("head/**"))(
        *start, [batch]
    )
    assert np.isfinite(found["loss"])


def test_it_raises_when_it_cannot_be_exact(model, start, make_batches):
    accuracy = {"accuracy": tj.objectives.accuracy}
    tuning = tj.train("head/**")
    with pytest.raises(tj.TransferError, match=r"make_eval\(\) expects at least one metric, such as {'accuracy'"):
        tj.make_eval(model.apply, {}, tuning)
    with pytest.raises(tj.DataError, match=r"evaluate\(\) got no batch\. Expected at least one\."):
        tj.make_eval(model.apply, accuracy, tuning)(*start, [])
    with pytest.raises(
        tj.DataError, match=r"evaluate\(\) got examples whose weights sum to 0\. Expected a positive sum"
    ):
        batch = {**make_batches(1)[0], "weight": np.zeros(4)}
        tj.make_eval(model.apply, accuracy, tuning)(*start, [batch])
    with pytest.raises(
        tj.TransferError, match=r"metric 'mean' gave \(\) float32; expected one value per example, \(4,\)\."
    ):
        tj.make_eval(model.apply, {"mean": lambda outputs, batch: jnp.mean(outputs)}, tuning)(*start, make_batches(1))


def test_a_scalar_entry_of_the_batch_is_not_padded(model, start, make_batches):
    (state, frozen), tuning = start, tj.train("head/**")
    whole, part = make_batches(1)[0], make_batches(1, size=2)[0]
    evaluate = tj.make_eval(model.apply, {"accuracy": tj.objectives.accuracy}, tuning)
    temperature = {"temperature": np.float32(2)}
    expected = evaluate(state, frozen, [whole, part])
    assert evaluate(state, frozen, [whole | temperature, part | temperature]) == expected


def test_metrics_and_tunings_of_another_form_raise(model):
    with pytest.raises(
        tj.TransferError, match=r"expects a dict of metrics second, got function: write \{'accuracy': tj"
    ):
        tj.make_eval(model.apply, tj.objectives.accuracy, tj.full())
    with pytest.raises(tj.TransferError, match=r"expects a Tuning third, got str: write tj\.train\('head/\*\*'\)\."):
        tj.make_eval(model.apply, {"accuracy": tj.objectives.accuracy}, "head/**")
