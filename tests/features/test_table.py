"""Features by name, their ids and their pooling."""

import jax.numpy as jnp
import numpy as np
import pytest

from transferjax._errors import DataError, SelectionError
from transferjax.features import FeatureTable, attention_pool, class_token, flatten, max_pool, mean_pool


def table(ids=(3, 1, 2)):
    rows = np.asarray(ids, float)
    return FeatureTable({"a": rows[:, None] * [1, 10], "map": np.ones((len(ids), 2, 2, 3))}, np.array(ids), rows)


def test_rows_are_taken_with_their_ids_and_labels():
    some = table().take(np.array([True, False, True]))
    assert some.ids.tolist() == [3, 2] and some["a"].tolist() == [[3, 30], [2, 20]] and some.labels.tolist() == [3, 2]
    assert len(FeatureTable({"a": np.ones((2, 1))}, np.arange(2)).take([1])) == 1


def test_layers_stand_side_by_side():
    assert table().concatenated().shape == (3, 2 + 12)
    assert table().concatenated(["a"]).shape == (3, 2)
    assert table().report().column("bytes per example") == [16, 96]


def test_two_tables_meet_at_their_ids():
    one, other = table().beside(table((2, 3, 9)))
    assert one.ids.tolist() == other.ids.tolist() == [2, 3]
    np.testing.assert_array_equal(one["a"], other["a"])


@pytest.mark.parametrize("pool", [mean_pool, max_pool, class_token, attention_pool, flatten])
def test_pooling_gives_one_row_per_example(pool):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3)))
    found = pool(x)
    assert found.shape == ((2, 15) if pool is flatten else (2, 3))
    np.testing.assert_allclose(found[1], pool(x[1:])[0], rtol=1e-6)
    np.testing.assert_array_equal(pool(x[:, 0]), x[:, 0])


def test_pooling_of_maps_and_what_attention_weighs():
    x = jnp.arange(24.0).reshape(1, 2, 4, 3)
    np.testing.assert_allclose(mean_pool(x), x.reshape(1, 8, 3).mean(1))
    np.testing.assert_allclose(max_pool(x)[0], [21, 22, 23])
    sequence = jnp.array([[[10.0, 0.0], [10.0, 0.0], [-10.0, 0.0]]])
    np.testing.assert_allclose(attention_pool(sequence)[0], [10.0, 0.0], rtol=1e-5)


def test_what_does_not_fit_is_named():
    with pytest.raises(DataError, match=r"ids are \(2, 1\) int64; expected integers \[N\]"):
        FeatureTable({}, np.ones((2, 1), int))
    with pytest.raises(DataError, match="id 4 stands in the table 2 times"):
        FeatureTable({}, np.array([4, 5, 4]))
    with pytest.raises(DataError, match=r"'a' is \(2, 3\) float64; expected 3 rows, one per id"):
        FeatureTable({"a": np.ones((2, 3))}, np.arange(3))
    with pytest.raises(DataError, match="'labels' is"):
        FeatureTable({}, np.arange(3), np.arange(2))
    with pytest.raises(SelectionError, match=r"there are no features 'mapp'\. Nearest: map"):
        table()["mapp"]
    with pytest.raises(SelectionError, match=r"concatenated\(\) got no name of features"):
        table().concatenated([])
    with pytest.raises(DataError, match="no example is in both tables: ids 1 to 3 and 7 to 8"):
        table().beside(table((7, 8)))
