"""One pass gives the features of every layer, in order, once per example, and goes on where it stopped."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import transferjax as tj
from transferjax._errors import DataError, SelectionError
from transferjax.features import extract, flatten, mean_pool, raw_inputs


class Network(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.stem(x))).mean((1, 2))))


MODEL = tj.interop.nnx(Network(nnx.Rngs(0)))
IMAGES = np.random.default_rng(0).normal(size=(10, 5, 5, 2)).astype(np.float32)


def batches(sizes=(4, 4, 2), start=100):
    first = 0
    for size in sizes:
        rows = slice(first, first + size)
        ids = np.arange(first, first + size) + start
        yield {"inputs": IMAGES[rows], "labels": ids % 3, "id": ids}
        first += size


def by_hand(at):
    outputs, _, captured = MODEL.capture(MODEL.params, MODEL.extra, IMAGES, at)
    return outputs, captured


def test_outputs_and_layers_come_in_one_pass_in_inference_mode():
    outputs, captured = by_hand("{stem,norm,head}")
    table = extract(MODEL, batches(), at="{stem,norm,head}")
    np.testing.assert_allclose(table["outputs"], outputs, rtol=1e-5, atol=1e-6)
    for name in ("stem", "norm"):
        np.testing.assert_allclose(table[name], captured[name].mean((1, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(table["head"], outputs, rtol=1e-5, atol=1e-6)
    assert table.ids.tolist() == list(range(100, 110)) and table.labels.tolist() == [i % 3 for i in range(100, 110)]
    assert list(table.arrays) == ["head", "norm", "stem", "outputs"]
    assert list(extract(MODEL, batches()).arrays) == ["outputs"]


def test_one_program_serves_a_smaller_last_batch(monkeypatch):
    traced = []
    apply = lambda *args, **options: traced.append(1) or MODEL.apply(*args, **options)
    table = extract(MODEL._replace(apply=apply), batches())
    assert len(traced) == 1 and len(table) == 10
    np.testing.assert_allclose(table["outputs"][8:], by_hand("head")[0][8:], rtol=1e-5, atol=1e-6)


def test_pooling_is_a_function_and_none_keeps_maps():
    assert extract(MODEL, batches(), at="stem", pool=None)["stem"].shape == (10, 5, 5, 4)
    assert extract(MODEL, batches(), at="stem", pool=flatten)["stem"].shape == (10, 100)
    most = extract(MODEL, batches(), at="stem", pool=lambda x: x.max((1, 2)) if x.ndim == 4 else x)["stem"]
    np.testing.assert_allclose(most, by_hand("stem")[1]["stem"].max((1, 2)), rtol=1e-5, atol=1e-6)


def test_an_interrupted_pass_goes_on_from_its_cache(tmp_path):
    make = lambda: tj.io.FeatureCache(tmp_path / "cache", fingerprint="network:1")
    whole = extract(MODEL, batches(), at="stem")

    def failing():
        yield next(batches())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(MODEL, failing(), at="stem", cache=make())
    cache = make()
    assert len(cache) == 4
    calls = []
    again = MODEL._replace(capture=lambda *a, **o: calls.append(1) or MODEL.capture(*a, **o))
    found = extract(again, batches(), at="stem", cache=cache)
    assert len(calls) == 1, "traced once for what was missing"
    for name in whole.arrays:
        np.testing.assert_allclose(found[name], whole[name], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.labels, whole.labels)
    nothing = MODEL._replace(capture=lambda *a, **o: pytest.fail("all of it is stored"))
    given = tj.data.batches(tj.data.arrays(IMAGES, whole.labels, whole.ids), 5, shuffle=False)
    np.testing.assert_array_equal(extract(nothing, given, at="stem", cache=cache)["stem"], found["stem"])


def test_texts_are_dicts_of_inputs():
    apply = lambda params, inputs: jnp.einsum("btd,bt->bd", inputs["x"][..., None] * params["kernel"], inputs["mask"])
    model = tj.interop.pure(apply, {"kernel": jnp.ones(3)})
    inputs = {"x": np.ones((4, 6), np.float32), "mask": np.ones((4, 6), np.float32)}
    given = [{"inputs": {k: v[:n] for k, v in inputs.items()}, "id": np.arange(n) + n} for n in (4, 2)]
    np.testing.assert_allclose(extract(model, given)["outputs"], np.full((6, 3), 6.0))
    with pytest.raises(DataError, match="the inputs are a dict of mask, x; expected one array"):
        raw_inputs(given)


def test_raw_inputs_are_features_too():
    table = raw_inputs(batches())
    np.testing.assert_array_equal(table["inputs"], IMAGES.reshape(10, -1))
    assert table.labels.tolist() == [i % 3 for i in range(100, 110)]
    with pytest.raises(DataError, match=r"raw_inputs\(\) got no batch"):
        raw_inputs([])


def test_what_does_not_fit_is_named():
    with pytest.raises(DataError, match=r"extract\(\) got no batch"):
        extract(MODEL, [])
    with pytest.raises(DataError, match="a batch has inputs; expected a dict with 'inputs' and 'id'"):
        extract(MODEL, [{"inputs": IMAGES}])
    with pytest.raises(DataError, match="id 100 stands in the table 2 times"):
        extract(MODEL, [*batches(), *batches()])
    with pytest.raises(SelectionError, match="matched none"):
        extract(MODEL, batches(), at="blocks/*")
    with pytest.raises(SelectionError, match="this Model cannot say what its modules make: capture is None"):
        extract(MODEL._replace(capture=None), batches(), at="stem")
    scalar = tj.interop.pure(lambda params, x: x.sum((1, 2, 3)), {})
    with pytest.raises(SelectionError, match=r"'outputs' is \(4,\) float32; expected an array \[B, \.\.\., d\]"):
        extract(scalar, batches(), pool=mean_pool)
