import pickle

import numpy as np
import pytest

from transferjax import _errors
from transferjax.data import arrays, check_classes
from transferjax.data._source import check_empty, check_labels, corrupt, whole


def test_a_source_is_a_sequence(ten):
    assert len(ten) == 10
    assert [example["id"] for example in ten] == list(range(10))
    assert ten[-1]["image"].max() == 9
    assert repr(ten) == "Source(arrays: 10 examples, 3 class names)"
    assert whole(ten.records, ten.class_names, "again").labels().tolist() == ten.labels().tolist()


def test_an_index_outside_raises(ten):
    with pytest.raises(IndexError, match="arrays has 10 examples; there is none at 10"):
        ten[10]


def test_ids_stay_with_their_examples(ten):
    part = ten.subset([7, 2]).subset([1])
    assert part[0]["id"] == 2
    assert part.ids().tolist() == [2]
    assert part.labels().tolist() == [2]
    assert part.where(0) == "the example with id 2"


def test_take_is_the_first_ones(ten):
    assert ten.take(3).ids().tolist() == [0, 1, 2]
    assert len(ten.take(99)) == 10


def test_subset_outside_raises(ten):
    with pytest.raises(_errors.DataError, match="arrays has 10 examples; there is none at 12"):
        ten.subset([1, 12])


def test_fingerprints_tell_content_and_selection(ten):
    same = arrays(ten.records.features["image"], ten.labels(), class_names=ten.class_names)
    assert ten.fingerprint() == same.fingerprint()
    assert ten.fingerprint() != ten.take(9).fingerprint()
    other = ten.records.features["image"].copy()
    other[3, 0, 0] += 1
    assert ten.fingerprint() != arrays(other, ten.labels()).fingerprint()


def test_a_pickled_source_reads_the_same(ten, sample_train):
    for source in (ten, sample_train.take(3)):
        again = pickle.loads(pickle.dumps(source))
        assert again.fingerprint() == source.fingerprint()
        np.testing.assert_array_equal(again[2]["image"], source[2]["image"])


def test_classes_are_counted(ten):
    report = check_classes(ten)
    assert report.column("name") == ["a", "b", "c"]
    assert report.column("examples") == [4, 3, 3]
    assert check_classes(ten, num_classes=5).column("examples") == [4, 3, 3, 0, 0]


def test_one_class_raises_and_is_named(ten):
    with pytest.raises(_errors.DataError, match=r"one class only: all 4 examples have label 0 \(a\)"):
        check_classes(ten.subset([0, 3, 6, 9]))


def test_an_empty_source_raises(ten):
    with pytest.raises(_errors.DataError, match="arrays is empty: expected at least one example"):
        check_empty(ten.subset([]))
    with pytest.raises(_errors.DataError, match="arrays is empty"):
        check_classes(ten.subset([]))


def test_a_label_outside_the_classes_names_the_id():
    images = np.zeros((3, 2, 2), np.uint8)
    with pytest.raises(_errors.DataError, match=r"arrays: the example with id 41 has label 5; expected 0 to 1"):
        arrays(images, [0, 5, 1], ids=[40, 41, 42], class_names=("a", "b"))
    source = arrays(images, [0, 5, 1], ids=[40, 41, 42])
    with pytest.raises(_errors.DataError, match=r"id 41 has label 5; expected 0 to 1 \(2 classes\). 1 of 3 labels"):
        check_classes(source, num_classes=2)


@pytest.mark.parametrize("labels", [np.array([0.5, 1.0], np.float32), np.ones((2, 3), np.int32)])
def test_targets_have_no_classes_to_count(labels):
    source = arrays(np.zeros((2, 2, 2), np.uint8), labels)
    with pytest.raises(_errors.DataError, match=r"arrays has labels that are no integers but .*regression have no cl"):
        check_classes(source)


def test_targets_that_are_no_classes_are_not_checked(ten):
    check_labels(ten, np.array([7.5]), np.array([0]))
    check_labels(ten, np.array([[9, 9]]), np.array([0]))


def test_a_corrupt_example_is_named():
    error = corrupt(3, "cat/3.png", OSError("truncated"))
    assert str(error).startswith("cat/3.png cannot be decoded (OSError: truncated). Replace or remove it, or pass on_")
    assert (error.index, error.where) == (3, "cat/3.png")
