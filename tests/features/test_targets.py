"""Labels as matrices, standardisation, folds, and what is refused."""

import numpy as np
import pytest

from transferjax._errors import DataError
from transferjax.features._targets import (
    CLASSES,
    LABELS,
    TARGETS,
    as_strengths,
    as_targets,
    as_training,
    by_classes,
    fold_numbers,
    path_report,
    quality,
    standardisation,
    widen,
)


@pytest.mark.parametrize(
    ("labels", "kind", "width", "flat"),
    [
        (np.array([0, 2, 1, 1]), CLASSES, 3, False),
        (np.array([True, False, True, True]), CLASSES, 2, False),
        (np.array([0, 1, 2, 1], np.uint8), CLASSES, 3, False),
        (np.eye(4, 2, dtype=bool), LABELS, 2, False),
        (np.eye(4, 2, dtype=np.float32), LABELS, 2, False),
        (np.eye(4, 2, dtype=int), LABELS, 2, False),
        (2 * np.eye(4, 2), TARGETS, 2, False),
        (np.array([0.0, 1.0, 1.0, 0.0]), TARGETS, 1, True),
    ],
)
def test_type_and_shape_say_what_labels_are(labels, kind, width, flat):
    found = as_targets(labels, None)
    assert (found.kind, found.width, found.flat) == (kind, width, flat)
    wanted = np.eye(width)[labels.astype(int)] if kind == CLASSES else labels.reshape(4, -1)
    np.testing.assert_array_equal(found.matrix, wanted)
    assert found.matrix.dtype == np.float64
    np.testing.assert_array_equal(found.signs, wanted if kind == TARGETS else 2 * wanted - 1)


def test_classes_may_be_absent_when_their_number_is_given():
    found = as_targets(np.array([3, 1, 3]), 5)
    assert found.matrix.shape == (3, 2) and found.columns.tolist() == [1, 3] and found.width == 5
    assert widen(found, np.array([1.0, 2.0]), -np.inf).tolist() == [-np.inf, 1, -np.inf, 2, -np.inf]


def test_examples_of_weight_zero_are_left_out():
    found = as_training(np.eye(4), [0, 2, 1, 1], [1, 0, 2, 1], None, name="ridge")
    assert found.features.shape == (3, 4) and found.weights.tolist() == [1, 2, 1] and found.targets.width == 2


def test_labels_that_cannot_be_read():
    with pytest.raises(DataError, match="labels start at -1; expected classes from 0"):
        as_targets(np.array([-1, 0, 1]), None)
    with pytest.raises(DataError, match="labels skip class 1: 3 examples hold 2 of the 3 classes up to the largest"):
        as_targets(np.array([0, 2, 2]), None)
    with pytest.raises(DataError, match="num_classes is 2; expected at least 3, the largest label plus one"):
        as_targets(np.array([0, 1, 2]), 2)
    with pytest.raises(DataError, match=r"num_classes is 2 and labels are \(2,\) float64; expected integers"):
        as_targets(np.array([0.5, 2]), 2)
    with pytest.raises(DataError, match=r"labels are \(1, 1, 1\) float64; expected integers \[N\] for classes"):
        as_targets(np.ones((1, 1, 1)), None)
    with pytest.raises(DataError, match=r"labels are \(2,\) <U1; expected integers \[N\] for classes"):
        as_targets(np.array(["a", "b"]), None)
    with pytest.raises(DataError, match=r"labels are not finite\. Expected finite numbers: leave such examples out"):
        as_targets(np.array([0.5, np.inf]), None)
    with pytest.raises(DataError, match="labels have 0 examples and features 2"):
        as_training(np.eye(2), 1, None, None, name="ridge")
    with pytest.raises(DataError, match=r"svm\(\) reads out classes; these labels are targets\. Write ridge"):
        as_training(np.eye(2), [0.5, 1], None, None, name="svm", takes=(CLASSES,), instead="Write ridge().")
    with pytest.raises(
        DataError, match=r"features are constant: all 2 examples have the same\. Expected features that"
    ):
        as_training(np.ones((2, 3)), [0, 1], None, None, name="svm")


@pytest.mark.parametrize("bad", [[], [1.0, 0.0], [-1.0], [np.nan], [[1.0]]])
def test_strengths_are_positive_numbers(bad):
    with pytest.raises(DataError, match=r"strengths are .*; expected numbers above 0, at least one"):
        as_strengths(bad)


def test_standardisation_by_weight():
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(50, 3)) * [1, 10, 0] + [5, 0, 0.1], rng.integers(1, 4, 50)
    shift, scale = standardisation(x, weights, True)
    repeated = np.repeat(x, weights, axis=0)
    np.testing.assert_allclose(shift, repeated.mean(0), rtol=1e-6)
    np.testing.assert_allclose(scale[:2], 1 / repeated[:, :2].std(0), rtol=1e-6)
    assert scale[2] == 0 and (scale == scale.astype(np.float32)).all()
    assert standardisation(x, weights, False)[1].tolist() == [1, 1, 1]
    assert standardisation(x, weights, False, centre=False)[0].tolist() == [0, 0, 0]


def test_folds_are_stratified_and_repeatable():
    labels = np.repeat([0, 1, 2], [20, 10, 5])
    targets = as_targets(labels, None)
    folds = fold_numbers(targets, 5, seed=0)
    counts = np.array([np.bincount(folds[labels == code], minlength=5) for code in range(3)])
    assert (counts == np.array([[4], [2], [1]])).all()
    assert (folds == fold_numbers(targets, 5, seed=0)).all() and (folds != fold_numbers(targets, 5, seed=1)).any()


def test_folds_of_labels_and_targets_are_even():
    yes = np.random.default_rng(0).random((60, 4)) < [0.5, 0.3, 0.2, 0.1]
    folds = fold_numbers(as_targets(yes, None), 3, seed=0)
    for column in yes.T:
        spread = np.bincount(folds[column], minlength=3)
        assert spread.max() - spread.min() <= 2
    sizes = np.bincount(fold_numbers(as_targets(np.linspace(0, 1, 10), None), 3, seed=0))
    assert sorted(sizes) == [3, 3, 4]


def test_folds_need_examples():
    targets = as_targets(np.array([0, 0, 1]), None)
    with pytest.raises(DataError, match=r"class 1 has 1 example\(s\), and choosing among several strengths by folds"):
        fold_numbers(targets, 2, 0)
    with pytest.raises(DataError, match="folds is 4; expected a whole number from 2 to 3, the number of examples"):
        fold_numbers(targets, 4, 0)
    with pytest.raises(DataError, match=r"label 1 has 0 example\(s\)"):
        fold_numbers(as_targets(np.array([[1, 0], [1, 0], [0, 0]]), None), 2, 0)


def test_quality_is_accuracy_or_explained_variance():
    from sklearn.metrics import accuracy_score, r2_score

    rng = np.random.default_rng(0)
    outputs, weights = rng.normal(size=(30, 3)), rng.random(30)
    classes, yes, numbers = rng.permutation(30) % 3, rng.random((30, 3)) < 0.5, rng.normal(size=(30, 3))
    found = quality(as_targets(classes, None), outputs, weights)
    assert found == pytest.approx(accuracy_score(classes, outputs.argmax(1), sample_weight=weights))
    found = quality(as_targets(yes, None), outputs, weights)
    assert found == pytest.approx(np.average((outputs > 0) == yes, axis=0, weights=weights).mean())
    found = quality(as_targets(numbers, None), outputs, weights)
    assert found == pytest.approx(r2_score(numbers, outputs, sample_weight=weights))


def test_labels_are_pairs_of_classes():
    def fit(codes, number):
        return np.array([[10.0, 11.0 + codes[0]]]), np.array([0.0, 1.0])

    kernel, bias = by_classes(as_targets(np.array([[True, False], [False, True]]), None), fit)
    assert kernel.tolist() == [[2.0, 1.0]] and bias.tolist() == [1.0, 1.0]
    with pytest.raises(DataError, match="label 1 is the same for all examples; expected some with yes"):
        by_classes(as_targets(np.array([[True, False], [False, False]]), None), fit)


def test_the_report_marks_the_choice():
    report = path_report("Path", ("strength", "error"), [(1.0, 3.0), (2.0, 2.0)], 1, "folds", examples=4)
    assert report.column("chosen") == [False, True]
    assert report.metadata == {"strength": 2.0, "chosen by": "folds", "examples": 4}
