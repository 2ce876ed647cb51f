"""diff: every state a leaf can be in, and distances that are honest."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from transferjax import Model, io
from transferjax._errors import CheckpointError
from transferjax.io import _diff
from transferjax.io._diff import diff


def row(a, b, **options):
    return diff({"x": a}, {"x": b}, **options).rows[0]


def test_states(tmp_path):
    a = {"same": np.arange(3.0), "value": np.ones(4, np.float32), "shape": np.zeros((2, 3)), "type": np.ones(2),
         "mine": np.zeros(1)}  # fmt: skip
    b = {"same": np.arange(3.0), "value": np.full(4, 1.5, np.float32), "shape": np.zeros((3, 2)),
         "type": np.ones(2, np.float32), "yours": np.zeros(1)}  # fmt: skip
    expected = [
        ("mine", "only in a", "(1,)", None, "float64", None, None, None),
        ("same", "equal", "(3,)", "(3,)", "float64", "float64", 0.0, 0.0),
        ("shape", "shape", "(2, 3)", "(3, 2)", "float64", "float64", None, None),
        ("type", "dtype", "(2,)", "(2,)", "float64", "float32", 0.0, 0.0),
        ("value", "values", "(4,)", "(4,)", "float32", "float32", 0.5, 0.5),
        ("yours", "only in b", None, "(1,)", None, "float64", None, None),
    ]
    assert list(diff(a, b).rows) == expected
    places = [io.save(tmp_path / f"{name}.npz", side).metadata["path"] for name, side in (("a", a), ("b", b))]
    report = diff(*map(io.open, places))
    assert list(report.rows) == expected
    facts = {"equal": False, "dtype": 1, "equal leaves": 1, "only in a": 1, "only in b": 1, "shape": 1, "values": 1}
    assert report.metadata == facts and report.title == "5 leaves against 5"
    assert {r[0]: r[1] for r in diff(a, b, values=False).rows}["value"] == "same form"
    assert diff(a, a).metadata == {"equal": True, "equal leaves": 5}


def test_paths_are_in_natural_order():
    side = {f"blocks.{i}.w": np.zeros(1) for i in (10, 9, 2)}
    assert [r[0] for r in diff(side, side).rows] == ["blocks.2.w", "blocks.9.w", "blocks.10.w"]


@pytest.mark.parametrize(
    ("a", "b", "state", "gap", "relative"),
    [
        (np.array([np.nan, 1.0]), np.array([np.nan, 1.0]), "equal", 0.0, 0.0),
        (np.array([np.inf]), np.array([np.inf]), "equal", 0.0, None),
        (np.array([0.0]), np.array([-0.0]), "values", 0.0, 0.0),
        (np.array([0.0]), np.array([2.0]), "values", 2.0, np.inf),
        (np.array([3.0, 4.0]), np.array([3.0, 9.0]), "values", 5.0, 1.0),
        (np.array([1 + 1j]), np.array([1 - 1j]), "values", 2.0, np.sqrt(2)),
        (np.array([1], np.uint8), np.array([255], np.uint8), "values", 254.0, 254.0),
        (np.array([1], ml_dtypes.bfloat16), np.array([2], ml_dtypes.bfloat16), "values", 1.0, 1.0),
        (np.array([True]), np.array([False]), "values", 1.0, 1.0),
        (np.zeros((0, 3)), np.zeros((0, 3)), "equal", 0.0, 0.0),
        (np.array("a"), np.array("b"), "values", None, None),
        (3.0, 3.0, "equal", 0.0, 0.0),
    ],
)
def test_distances(a, b, state, gap, relative):
    found = row(a, b)
    assert found[1] == state and found[6] == gap
    if relative is None or gap is None:
        assert gap is None or found[7] is None or np.isnan(found[7]) or found[7] == 0
    else:
        assert found[7] == pytest.approx(relative)


def test_a_nan_in_one_is_a_difference():
    assert np.isnan(row(np.array([1.0, np.nan]), np.array([1.0, 2.0]))[6])


def test_long_arrays_are_compared_in_parts(monkeypatch):
    monkeypatch.setattr(_diff, "CHUNK", 4)
    a = np.arange(10.0)
    b = a.copy()
    b[9] += 7
    assert row(a, b)[6] == 7.0 and row(a, b)[7] == pytest.approx(7 / np.linalg.norm(a))


def test_trees_are_compared_by_their_leaves(tmp_path):
    tree = {"a": {"b": np.ones(2)}, "layers": [np.zeros(1), 3]}
    equal = {"equal": True, "equal leaves": 3}
    assert diff(tree, {"a": {"b": np.ones(2)}, "layers": [np.zeros(1), 3]}).metadata == equal
    other = {"a": {"b": np.array([1.0, 2.0])}, "layers": tree["layers"]}
    assert diff(tree, other).rows[0][:2] == ("a/b", "values")
    model = Model(None, None, {"a": tree["a"]}, {"layers": tree["layers"]})
    assert diff(model, tree).metadata == equal
    path = io.save(tmp_path / "w.npz", tree).metadata["path"]
    for saved in (path, tmp_path / "w.npz", io.open(path)):
        assert diff(saved, model).metadata == diff(tree, saved).metadata == equal


def test_shapes_alone_have_no_values():
    shapes = jax.eval_shape(lambda: {"a": jnp.ones(2)})
    assert diff(shapes, {"a": np.ones(2, np.float32)}, values=False).rows[0][1] == "same form"
    with pytest.raises(
        CheckpointError, match=r"diff\(\) cannot compare dict: 'a' is \(2,\) float32 in it. Expected a check"
    ):
        diff(shapes, shapes)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "cannot compare NoneType: it has no named leaf. Expected a checkpoint, its path, or a tree of arrays"),
        (np.ones(2), "cannot compare ndarray: it has no named leaf"),
        ({}, "cannot compare dict: it has no named leaf"),
        ({"a": print}, "cannot compare dict: 'a' is builtin_function_or_method in it"),
        ({"a/b": 1, "a": {"b": 2}}, "two leaves have the path 'a/b'"),
        ("nowhere.npz", "there is nothing at '.*nowhere.npz'"),
    ],
)
def test_what_cannot_be_compared(wrong, message):
    for sides in ((wrong, {"a": np.ones(1)}), ({"a": np.ones(1)}, wrong)):
        with pytest.raises(CheckpointError, match=message):
            diff(*sides)
