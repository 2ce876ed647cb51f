import json
import logging
import pathlib
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from transferjax import _errors
from transferjax.data import CorruptExampleError, batches, open
from transferjax.data._tfds import from_builder, named, prepared

TRAIN = "fashion_mnist_sample-train.array_record-00000-of-00001"


class VectorsForTransferjaxTests(tfds.core.GeneratorBasedBuilder):
    """Vectors, texts and classes, without images."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = pathlib.Path(__file__).parent
    label = "label"

    def _info(self):
        features = {
            "feature": tfds.features.Tensor(shape=(4,), dtype=np.float32),
            "text": tfds.features.Text(),
            self.label: tfds.features.ClassLabel(num_classes=3),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(6), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"feature": np.full(4, i, np.float32), "text": f"é{i}", self.label: i % 3}


class NoLabelForTransferjaxTests(VectorsForTransferjaxTests):
    """The same with a label of another name."""

    label = "kind"


@pytest.fixture
def vectors(tmp_path):
    builder = VectorsForTransferjaxTests(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    return builder


def test_no_tensorflow(sample_train):
    assert sample_train[0]["image"].dtype == np.uint8
    assert "tensorflow" not in sys.modules


def test_images_agree_with_tfds(sample_train):
    theirs = sample_train.records.builder.as_data_source(split="train")
    for index in (0, 7, 999):
        np.testing.assert_array_equal(sample_train[index]["image"], theirs[index]["image"])
        assert sample_train[index]["label"] == theirs[index]["label"]
        assert sample_train[index]["id"] == theirs[index]["id"]


def test_other_features_pass_through_under_their_names(vectors):
    source = open(vectors.data_dir, "test")
    assert set(source[0]) == {"feature", "text", "label", "id"}
    assert source.image_shape() == ()
    assert sorted(source.ids()) == [6, 7]
    assert sorted(open(vectors.data_dir, "all").ids()) == list(range(8))
    with pytest.raises(_errors.DataError, match="'text' holds text"):
        list(batches(source, 2, seed=0))
    batch = next(iter(batches(from_builder(vectors, "test"), 2, shuffle=False, keep=("text",)).source))
    assert batch["feature"].shape == (4,)


def test_a_data_set_without_label_names_its_features(tmp_path):
    builder = NoLabelForTransferjaxTests(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    with pytest.raises(_errors.DataError, match=r"has no feature 'label'. Its features: feature, kind, text."):
        from_builder(builder, "train")


def test_a_name_finds_what_is_prepared(vectors, tmp_path):
    assert len(named("vectors_for_transferjax_tests", "train", str(tmp_path))) == 6
    assert len(open("vectors_for_transferjax_tests", "test", tmp_path)) == 2


def test_a_name_that_is_not_prepared_says_how_to(tmp_path):
    with pytest.raises(_errors.DataError, match=r"'fashion_mnist' is not prepared in .*\n  tfds.builder\('fash"):
        named("fashion_mnist", "train", str(tmp_path))


def test_an_unknown_name_names_the_nearest(tmp_path):
    with pytest.raises(_errors.DataError, match=r"'fashion_mnistt' is no data set.* Nearest: fashion_mnist, "):
        named("fashion_mnistt", "train", str(tmp_path))


def test_tfrecords_raise_and_say_how_to_convert(prepared_copy):
    info = json.loads((prepared_copy / "dataset_info.json").read_text())
    (prepared_copy / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    with pytest.raises(_errors.DataError, match=r"prepared as tfrecord, which only TensorFlow reads.*\n.*convert_f"):
        prepared(prepared_copy, "train")
    (prepared_copy / "dataset_info.json").write_text("{")
    with pytest.raises(_errors.DataError, match=r"its dataset_info.json cannot be read"):
        prepared(prepared_copy, "train")


def test_a_flipped_bit_in_one_record_is_found_and_can_be_skipped(prepared_copy):
    raw = bytearray((prepared_copy / TRAIN).read_bytes())
    raw[300000] ^= 1
    (prepared_copy / TRAIN).write_bytes(raw)
    source = prepared(prepared_copy, "train")
    with pytest.raises(CorruptExampleError, match=r"example \d+ of split 'train' of fashion_mnist_sample/1.0.0 cannot"):
        source.labels()
    some = batches(source, 10, seed=0, on_error="skip")
    assert len(some.skipped) == 1
    assert len(some.source) == 999
    assert some.source.where(0).startswith("example 0 of split 'train'")


def test_a_truncated_file_is_named(prepared_copy):
    (prepared_copy / TRAIN).write_bytes((prepared_copy / TRAIN).read_bytes()[:300000])
    with pytest.raises(CorruptExampleError, match=r"example 0 of split 'train' of fashion_mnist_sample/1.0.0 cannot"):
        prepared(prepared_copy, "train")[0]


def test_a_damaged_image_inside_a_sound_record_is_named(sample_train, monkeypatch):
    row = {"image": b"\x89PNG damaged", "label": 3, "id": 17}
    monkeypatch.setitem(sample_train.records._open, "train", [row])
    with pytest.raises(CorruptExampleError, match=r"id 17: example 0 of split 'train' of .* cannot be decoded"):
        sample_train.records[0]


def test_fingerprints_follow_content_not_place(sample_train, prepared_copy):
    assert prepared(prepared_copy, "train").fingerprint() == sample_train.fingerprint()
    raw = bytearray((prepared_copy / TRAIN).read_bytes())
    raw[300000] ^= 1
    (prepared_copy / TRAIN).write_bytes(raw)
    assert prepared(prepared_copy, "train").fingerprint() != sample_train.fingerprint()


def test_an_index_beyond_the_splits_raises(sample_train):
    with pytest.raises(IndexError, match="has 3,000 examples; there is none at 3000"):
        sample_train.records.where(3000)


def test_the_sample_is_read_without_complaints(caplog):
    with caplog.at_level(logging.WARNING):
        open("sample", "test")[0]
    assert not caplog.records
