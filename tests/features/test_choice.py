"""The choice of layers and features: what tells the classes is kept, and nothing is lost to the last layer."""

import functools

import jax
import numpy as np
import pytest

from transferjax._errors import DataError, SelectionError
from transferjax.features import FeatureTable
from transferjax.features._choice import best_layer, head2toe
from transferjax.features._ridge import ridge

RNG = np.random.default_rng(0)
LABELS = np.arange(90) % 3


def informative(width, columns, noise=0.3, labels=LABELS):
    """Features of which these columns tell the class."""
    x = RNG.normal(size=(len(labels), width))
    x[:, columns] = np.eye(3)[labels][:, : len(columns)] * 2 + noise * RNG.normal(size=(len(labels), len(columns)))
    return x.astype(np.float32)


def table(**layers):
    return FeatureTable(layers, np.arange(90), LABELS)


def accuracy(readout, features, labels=LABELS):
    return float((np.asarray(readout.predict(readout.params, features)).argmax(-1) == labels).mean())


def test_relevant_features_of_an_early_layer_are_kept():
    early, late = informative(40, [3, 17, 30]), RNG.normal(size=(90, 30)).astype(np.float32)
    given = table(early=early, outputs=late)
    found = head2toe(given, fractions=(3 / 70, 0.5))
    assert found.params["keep"].tolist() == [3, 17, 30]
    assert accuracy(found, given.concatenated()) > 0.95
    rows = {row["layer"]: row for row in found.report.to_dicts()}
    assert rows["early"]["kept"] == 3 and rows["outputs"]["kept"] == 0
    assert rows["early"]["relevance"] > 0.9 and sum(row["relevance"] for row in rows.values()) == pytest.approx(1)
    assert found.report.metadata["kept"] == "3 features"
    assert "all of 'outputs' 0." in found.report.metadata["candidates"]


def test_the_last_layer_is_a_candidate_of_its_own():
    early, late = RNG.normal(size=(90, 400)).astype(np.float32), informative(4, [0, 1, 2], noise=0.6)
    found = head2toe(table(early=early, outputs=late), fractions=(1.0,))
    assert found.params["keep"].tolist() == [400, 401, 402, 403] and found.report.metadata["kept"] == "all of 'outputs'"


def test_the_relevance_does_not_see_left_out_labels():
    """On noise, features chosen with the left-out labels would look far better than chance."""
    noise = RNG.normal(size=(90, 400)).astype(np.float32)
    found = head2toe(table(outputs=noise), fractions=(0.02,))
    assert found.report.metadata["left-out accuracy"] < 0.5


def test_the_best_layer_is_the_one_that_reads_out_best():
    given = table(
        early=informative(10, [0], noise=1.0), middle=informative(8, [0, 1, 2]), outputs=RNG.normal(size=(90, 5))
    )
    found = best_layer(given, readout=functools.partial(ridge, strengths=1.0))
    assert found.report.metadata["layer"] == "middle" and found.report.column("chosen") == [False, True, False]
    assert found.params["keep"].tolist() == list(range(10, 18))
    assert accuracy(found, given.concatenated()) > 0.95
    same = ridge(given["middle"], LABELS, strengths=1.0)
    np.testing.assert_allclose(
        found.predict(found.params, given.concatenated()), same.predict(same.params, given["middle"]), rtol=1e-5
    )


def test_layers_can_be_named_and_targets_are_read_out_too():
    x = RNG.normal(size=(90, 6)).astype(np.float32)
    given = FeatureTable({"map": x.reshape(90, 1, 2, 3), "outputs": RNG.normal(size=(90, 4))}, np.arange(90))
    found = best_layer(given, x[:, 2] * 2.0 + 1, layers=["outputs", "map"])
    assert found.report.metadata["layer"] == "map" and "left-out R2" in found.report.columns
    np.testing.assert_allclose(
        jax.jit(found.predict)(found.params, given.concatenated(["outputs", "map"])), x[:, 2] * 2 + 1, atol=0.05
    )
    assert head2toe(given, x[:, 2] > 0, layers=["map"], fractions=(1 / 6,)).params["keep"].tolist() == [2]


def test_what_cannot_be_chosen_from_is_named():
    given = table(outputs=informative(4, [0, 1, 2]))
    with pytest.raises(DataError, match=r"expected a FeatureTable first, got dict: write tj\.features\.extract"):
        head2toe({}, LABELS)
    with pytest.raises(SelectionError, match="there are no features 'input'"):
        head2toe(given, layers=["input"])
    with pytest.raises(SelectionError, match="there is no layer to choose from"):
        best_layer(given, layers=[])
    with pytest.raises(DataError, match="the table has no labels"):
        best_layer(FeatureTable(given.arrays, given.ids))
    with pytest.raises(DataError, match="labels have 3 examples and the table 90"):
        best_layer(given, LABELS[:3])
    for fractions in ((), (0.0,), (2.0,)):
        with pytest.raises(DataError, match="expected numbers above 0, at most 1"):
            head2toe(given, fractions=fractions)
    with pytest.raises(DataError, match="strength is 1; expected a number between 0 and 1, where nothing would be"):
        head2toe(given, strength=1)
