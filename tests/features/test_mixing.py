"""The learned mixture of layers: the layer that tells gets the weight, and it is a minimum."""

import jax
import numpy as np
import pytest

from transferjax._errors import DataError
from transferjax.features import FeatureTable
from transferjax.features._mixing import layer_mixing

RNG = np.random.default_rng(0)
NOISE = [RNG.normal(size=(120, 6)).astype(np.float32) for _ in range(3)]
LABELS = (NOISE[1][:, 0] + NOISE[1][:, 3] > 0).astype(int)
TABLE = FeatureTable({"a": NOISE[0], "b": NOISE[1], "outputs": NOISE[2]}, np.arange(120), LABELS)


def test_the_layer_that_tells_gets_the_weight():
    found = layer_mixing(TABLE)
    weights = dict(found.report.rows)
    assert weights["b"] > 0.9 and sum(weights.values()) == pytest.approx(1, abs=1e-6)
    outputs = jax.jit(found.predict)(found.params, TABLE.concatenated())
    assert (np.asarray(outputs).argmax(-1) == LABELS).mean() > 0.95
    assert found.report.metadata["left-out accuracy"] > 0.9 and found.report.metadata["strength"] in (1.0, 10.0, 100.0)


def test_targets_and_several_labels_too():
    target = NOISE[1] @ np.arange(6.0) + 3
    found = layer_mixing(TABLE, target, strengths=0.01, iterations=500)
    np.testing.assert_allclose(found.predict(found.params, TABLE.concatenated()), target, atol=0.3)
    several = np.stack([LABELS, 1 - LABELS], 1).astype(float)
    found = layer_mixing(TABLE, several, strengths=1.0)
    outputs = np.asarray(found.predict(found.params, TABLE.concatenated()))
    assert ((outputs > 0) == (several > 0)).mean() > 0.95
    assert "chosen by" not in found.report.metadata


def test_layers_of_unlike_width_are_named():
    table = FeatureTable({"a": NOISE[0], "b": NOISE[1][:, :2]}, np.arange(120), LABELS)
    with pytest.raises(DataError, match="layers have the widths a 6, b 2; expected equal ones, as a mean of layers"):
        layer_mixing(table)
