"""Weights in several files behind an index."""

import json
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from transferjax._errors import CheckpointError
from transferjax.io import open
from transferjax.surgery import plan


def _shards(folder, parts, **index):
    for file, arrays in parts.items():
        save_file(arrays, folder / file)
    places = {name: file for file, arrays in parts.items() for name in arrays}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places, **index}))


A, B = np.arange(3.0), np.arange(4, dtype=np.int8)
PARTS = {"model-1-of-2.safetensors": {"b": B}, "model-2-of-2.safetensors": {"a": A}}


def test_shards_by_folder_and_by_index(tmp_path):
    _shards(tmp_path, PARTS, metadata={"total_size": 28})
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        checkpoint = open(path)
        assert list(checkpoint) == ["b", "a"] and checkpoint.format == "safetensors"
        np.testing.assert_array_equal(checkpoint["a"], A)
        np.testing.assert_array_equal(checkpoint.read("b", slice(1, 3)), B[1:3])
    before = checkpoint.fingerprint()
    _shards(tmp_path, {**PARTS, "model-2-of-2.safetensors": {"a": A + 1}})
    assert open(tmp_path).fingerprint() != before


def test_a_missing_shard(tmp_path):
    _shards(tmp_path, PARTS)
    (tmp_path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"names the shard 'model-2-of-2\.safetensors' for 1 arrays, but it is missing"
    ):
        open(tmp_path)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "..", "", "a\\b", "C:x", "a\0b"])
def test_a_shard_elsewhere(tmp_path, shard):
    _shards(tmp_path, PARTS, weight_map={"a": shard})
    with pytest.raises(CheckpointError, match=r"places 'a' in .* Expected the name of a file in the same folder"):
        open(tmp_path)


def test_shards_that_do_not_hold_what_the_index_says(tmp_path):
    one, two = PARTS
    _shards(tmp_path, PARTS, weight_map={"a": two, "b": one, "c": one})
    with pytest.raises(CheckpointError, match=r"shard 'model-1-of-2.safetensors' of .* lacks c"):
        open(tmp_path)
    _shards(tmp_path, {one: {"b": B, "c": B}, two: {"a": A}}, weight_map={"a": two, "b": one})
    with pytest.raises(CheckpointError, match=r"shard 'model-1-of-2.safetensors' of .* also holds c, placed elsewhere"):
        open(tmp_path)


def test_duplicate_names_in_an_index(tmp_path):
    _shards(tmp_path, PARTS)
    text = (tmp_path / "model.safetensors.index.json").read_text()
    (tmp_path / "model.safetensors.index.json").write_text(text.replace('"a":', '"b":'))
    with pytest.raises(CheckpointError, match="names 'b' twice"):
        open(tmp_path)


@pytest.mark.parametrize("value", [[], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 1}}])
def test_no_index(tmp_path, value):
    (tmp_path / "x.index.json").write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=r"is no index of shards. Expected"):
        open(tmp_path)


def test_a_plan_is_named_as_one(tmp_path):
    made = plan({"a": A}, {"a": A})
    (tmp_path / "plan.json").write_text(made.to_json())
    with pytest.raises(CheckpointError, match=r"plan.json' is a plan of transferjax and holds no arrays. Read it with"):
        open(tmp_path / "plan.json")


def test_two_indices_and_a_huge_one(tmp_path, monkeypatch):
    _shards(tmp_path, PARTS)
    monkeypatch.setattr("transferjax.io._sharded._LONGEST_INDEX", 10)
    with pytest.raises(CheckpointError, match="an index has at most 10"):
        open(tmp_path)
    (tmp_path / "other.index.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"holds 2 indices: model.safetensors.index.json, other.index.json. Open one"
    ):
        open(tmp_path)


def test_a_damaged_shard_is_named(tmp_path):
    _shards(tmp_path, PARTS)
    (tmp_path / "model-1-of-2.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(CheckpointError, match=r"model-1-of-2.safetensors' is truncated"):
        open(tmp_path)


def test_shards_of_torch(tmp_path, kit):
    (tmp_path / "model-1.bin").write_bytes((kit.fixtures / "torch/bare.pth").read_bytes())
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"tensor": "model-1.bin"}}))
    checkpoint = open(tmp_path)
    assert checkpoint.format == "torch" and checkpoint["tensor"].tolist() == [0, 1, 2]
    assert checkpoint.verified == "verified" and len(checkpoint.fingerprint()) == 64
