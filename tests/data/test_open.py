import numpy as np
import pytest

from transferjax import _errors
from transferjax.data import open
from transferjax.data._open import SAMPLE

IMAGES, LABELS = np.zeros((4, 3, 3), np.uint8), np.array([0, 1, 1, 0])


def test_the_sample_has_its_two_splits():
    train, test = open("sample", "train"), open("sample", "test")
    assert (len(train), len(test)) == (1000, 2000)
    assert np.bincount(train.labels()).tolist() == [100] * 10
    assert test.ids().min() == 60000
    assert sorted(test.ids()) == list(range(60000, 62000))
    assert train.class_names[0] == "T-shirt/top"
    assert train.class_names[9] == "Ankle boot"


def test_the_sample_is_at_most_two_megabytes_and_states_its_licence():
    assert sum(file.stat().st_size for file in SAMPLE.iterdir()) <= 2_000_000
    assert "Copyright (c) 2017 Zalando SE" in (SAMPLE / "LICENSE").read_text()


def test_slices_of_the_sample_part_it_and_mix_classes():
    first, rest = open("sample", "train[:80%]"), open("sample", "train[80%:]")
    assert not set(first.ids()) & set(rest.ids())
    assert len(first) + len(rest) == 1000
    assert set(rest.labels()) == set(range(10))


def test_folders(folder, split_folder):
    assert len(open(f"folder:{folder}", "train[:6]")) == 6
    assert len(open(f"folder:{split_folder}", "test")) == 1


@pytest.mark.parametrize(
    ("spec", "split", "length"),
    [
        ((IMAGES, LABELS), "train", 4),
        ((IMAGES, LABELS, [9, 8, 7, 6]), "train[1:3]", 2),
        ([IMAGES, LABELS], "all", 4),
        ({"image": IMAGES, "label": LABELS}, "train[:50%]", 2),
        ({"inputs": IMAGES.astype(np.float32), "label": LABELS}, "train", 4),
        ({"train": (IMAGES, LABELS), "test": (IMAGES[:1], LABELS[:1])}, "test", 1),
        ({"train": {"image": IMAGES, "label": LABELS}}, "train[2:]", 2),
    ],
)
def test_arrays(spec, split, length):
    assert len(open(spec, split)) == length


def test_a_directory_above_the_prepared_one_is_enough(prepared_copy):
    assert len(open(prepared_copy)) == 1000
    assert len(open(str(prepared_copy.parent), "test")) == 2000


@pytest.mark.parametrize(
    ("spec", "split", "message"),
    [
        ("sample", "tes", r"sample has no split 'tes'. Its splits: 'train', 'test'. Nearest: test."),
        ("sampel", "train", r"'sampel' is no data set. Expected 'sample', 'folder:PATH', .* Nearest: sample"),
        ("./nowhere", "train", "there is no directory nowhere"),
        ((IMAGES,), "train", r"given as \(images, labels\) or \(images, labels, ids\); got 1 values"),
        ((IMAGES, LABELS), "test", "arrays has no split 'test'. Its splits: 'train'."),
        ({"train": (IMAGES, LABELS)}, "trian", "arrays has no split 'trian'. Its splits: 'train'. Nearest: train."),
        ({"a": (IMAGES, LABELS), "b": (IMAGES, LABELS)}, "a+b", "split 'a\\+b' joins arrays of several splits"),
        (7, "train", r"a data set is a text or arrays \(images, labels\); got int"),
    ],
)
def test_a_spec_that_is_none_says_what_to_write(spec, split, message):
    with pytest.raises(_errors.DataError, match=message):
        open(spec, split)


def test_a_source_is_not_opened_again(ten):
    with pytest.raises(_errors.DataError, match="a Source already; use its take or subset"):
        open(ten)


def test_a_directory_that_is_not_prepared(tmp_path, folder):
    with pytest.raises(_errors.DataError, match=r"no data set prepared by TFDS.*write 'folder:"):
        open(folder)


def test_several_prepared_directories_are_named(prepared_copy):
    (prepared_copy.parent / "second").mkdir()
    (prepared_copy.parent / "second" / "dataset_info.json").write_text("{}")
    with pytest.raises(_errors.DataError, match=r"holds 2 prepared data sets; name one: .*prepared, .*second\."):
        open(prepared_copy.parent)
