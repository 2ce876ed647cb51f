import sys

import numpy as np
import pytest

from transferjax.data import open
from transferjax.data.sample import make as script


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    from transferjax.data.sample import builder

    monkeypatch.setattr(builder, "squeeze", lambda data: builder._deflate(data, 0))
    monkeypatch.setattr(builder, "TRAIN_PER_CLASS", 10)
    monkeypatch.setattr(builder, "TEST_COUNT", 70)


def test_the_script_makes_the_sample(idx_files, tmp_path, monkeypatch, capsys):
    source, images, labels = idx_files
    output = tmp_path / "made"
    monkeypatch.setattr(sys, "argv", ["make", "--source", str(source), "--output", str(output)])
    script.main()
    assert f"{output}: " in capsys.readouterr().out
    train, test = open(output, "train"), open(output, "test")
    assert np.bincount(train.labels()).tolist() == [10] * 10
    assert sorted(train.ids()) == list(range(100))
    assert sorted(test.ids() - 60000) == list(range(70))
    for example in (*train.take(5), *test.take(5)):
        np.testing.assert_array_equal(example["image"][..., 0], images[example["id"] % 60000])
        assert example["label"] == labels[example["id"] % 60000]


def test_too_large_a_sample_is_not_written(idx_files, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "LIMIT", 1000)
    with pytest.raises(SystemExit, match=r"bytes; expected at most 1,000: pip install zopfli"):
        script.make(str(idx_files[0]), tmp_path / "made")
    assert not (tmp_path / "made").exists()
