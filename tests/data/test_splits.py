import pytest

from transferjax import _errors
from transferjax.data._splits import select

SIZES = {"train": 10, "test": 3}


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", list(range(10))),
        ("test", [10, 11, 12]),
        ("all", list(range(13))),
        ("train[:30%]", [0, 1, 2]),
        ("train[30%:50%]", [3, 4]),
        ("train[8:]", [8, 9]),
        ("train[-2:]", [8, 9]),
        ("train[-20%:]", [8, 9]),
        ("train[:-70%]", [0, 1, 2]),
        ("train[2:4]", [2, 3]),
        ("train[:100]", list(range(10))),
        ("test[:50%]", [10, 11]),
        ("test + train[:1]", [10, 11, 12, 0]),
    ],
)
def test_a_slice_selects(split, expected):
    assert select(split, SIZES, "mine").tolist() == expected


def test_slices_agree_with_tfds(sample_train):
    builder = sample_train.records.builder
    for split in ("train[:17%]", "train[17%:33%]", "test[100:203]", "train[-5%:]"):
        assert len(select(split, {"train": 1000, "test": 2000}, "sample")) == len(builder.as_data_source(split=split))


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("tets", r"mine has no split 'tets'. Its splits: 'train', 'test'. Nearest: test."),
        ("train[1:2", r"'train\[1:2' is no slice of a split. Write 'train', 'train\[:80%\]' or 'train\[100:200\]'."),
        ("train[::2]", r"'train\[::2\]' is no slice"),
        ("train[:200%]", r"'train\[:200%\]' of mine goes to 200%; expected percentages from -100% to 100%."),
        ("train[-101%:]", r"goes to -101%; expected percentages"),
        ("train[5:5]", r"'train\[5:5\]' of mine selects none of its 10 examples."),
    ],
)
def test_a_bad_split_says_what_to_write(split, message):
    with pytest.raises(_errors.DataError, match=message):
        select(split, SIZES, "mine")
