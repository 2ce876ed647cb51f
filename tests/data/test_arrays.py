import numpy as np
import pytest

from transferjax import _errors
from transferjax.data import arrays
from transferjax.data._arrays import from_mapping


def test_grey_images_gain_a_channel():
    example = arrays(np.zeros((2, 4, 5), np.uint8), [1, 0])[0]
    assert example["image"].shape == (4, 5, 1)
    assert (example["label"], example["id"]) == (1, 0)


def test_other_arrays_are_inputs_as_they_are():
    source = arrays(np.ones((2, 7), np.float32), np.array([[0.5], [1.5]]), ids=[8, 9])
    assert set(source[1]) == {"inputs", "label", "id"}
    assert source[1]["label"].tolist() == [1.5]
    assert source[1]["id"] == 9
    assert source.image_shape() == ()


def test_a_dict_of_arrays_is_inputs_by_keyword():
    source = arrays({"tokens": np.zeros((2, 3), int), "mask": np.ones((2, 3), bool)}, [0, 1])
    assert set(source[0]["inputs"]) == {"tokens", "mask"}
    assert source[0]["inputs"]["tokens"].shape == (3,)
    assert source.fingerprint()


def test_a_mapping_names_its_parts():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    source = from_mapping({"images": images, "labels": [0, 1], "ids": [5, 6], "class_names": ["x", "y"]})
    assert source[1]["id"] == 6
    assert source[1]["image"].shape == (4, 4, 3)
    assert source.class_names == ("x", "y")
    assert set(from_mapping({"a": [1, 2], "b": [3, 4], "label": [0, 1]})[0]["inputs"]) == {"a", "b"}


@pytest.mark.parametrize(
    ("images", "labels", "ids", "message"),
    [
        (np.zeros((2, 4, 4), np.uint8), [0], None, "arrays differ in length: image 2, labels 1, ids 1"),
        (np.zeros((2, 4, 4), np.uint8), [0, 1], [3], "arrays differ in length: image 2, labels 2, ids 1"),
        (np.zeros((0, 4, 4), np.uint8), [], None, "arrays is empty: expected at least one example"),
        (np.float32(3), [0], None, "'inputs' is a single value; expected an array with one entry per example"),
        (np.zeros((3, 4, 4), np.uint8), [0, 1, 0], [3, 3, 4], "ids repeat \\(2 different ones for 3 examples\\)"),
    ],
)
def test_arrays_that_do_not_fit_raise(images, labels, ids, message):
    with pytest.raises(_errors.DataError, match=message):
        arrays(images, labels, ids)


def test_a_mapping_without_labels_raises():
    with pytest.raises(_errors.DataError, match=r"needs 'label' and 'image' \(or 'inputs'\); it has 'image'"):
        from_mapping({"image": np.zeros((2, 4, 4), np.uint8)})
