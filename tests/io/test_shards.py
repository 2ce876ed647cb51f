"""Safetensors in several files, as Hugging Face has them."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from transferjax._errors import CheckpointError
from transferjax.io import load, open, save
from transferjax.io._shards import shards

TREE = {
    "a": np.arange(6.0).reshape(2, 3), "b": {"w": np.ones(4, ml_dtypes.bfloat16), "t": np.arange(12.0).reshape(3, 4).T},
    "c": np.arange(5, dtype=np.int8), "step": 3, "empty": np.zeros((0, 2), np.float32),
}  # fmt: skip


def test_the_package_reads_every_file(tmp_path):
    save(tmp_path / "w", TREE, shard_bytes=100, metadata={"format": "pt", "epoch": 3})
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(os.listdir(tmp_path / "w")) == [*files, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "w/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 48 + 8 + 96 + 5 + 8 and set(index["weight_map"].values()) == set(files)
    found = {name: array for file in files for name, array in load_file(tmp_path / "w" / file).items()}
    for file in files:
        assert {n for n, place in index["weight_map"].items() if place == file} == set(load_file(tmp_path / "w" / file))
    assert np.array_equal(found["b/t"], TREE["b"]["t"]) and np.array_equal(found["a"], TREE["a"])


@pytest.mark.parametrize("limit", [1, 50, 100, 10**9])
def test_ours_come_back_verified(tmp_path, limit):
    report = save(tmp_path / "w", TREE, "safetensors", {"epoch": 3, "note": "x"}, shard_bytes=limit)
    checkpoint = open(tmp_path / "w")
    assert (checkpoint.format, checkpoint.verified) == ("safetensors", "verified")
    assert checkpoint.fingerprint() == report.metadata["fingerprint"]
    assert checkpoint.metadata == {"epoch": 3, "note": "x"} and set(checkpoint) == {
        "a",
        "b/t",
        "b/w",
        "c",
        "empty",
        "step",
    }
    found = load(tmp_path / "w", like=TREE)
    assert found["step"] == 3 and np.array_equal(found["b"]["t"], TREE["b"]["t"])
    assert checkpoint.read("b/t", np.s_[:, 1]).tolist() == TREE["b"]["t"][:, 1].tolist()
    assert ("model.safetensors" in os.listdir(tmp_path / "w")) == (limit == 10**9)
    save(tmp_path / "one.safetensors", TREE)
    assert open(tmp_path / "one.safetensors").fingerprint() == checkpoint.fingerprint()


def test_a_damaged_payload_is_noticed(tmp_path):
    save(tmp_path / "w", TREE, shard_bytes=50)
    for file in sorted((tmp_path / "w").glob("*.safetensors")):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    with pytest.raises(CheckpointError, match="does not match its digest"):
        open(tmp_path / "w")["a"]


def test_an_index_whose_digests_are_no_text(tmp_path):
    save(tmp_path / "w", TREE, shard_bytes=50)
    path = tmp_path / "w/model.safetensors.index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "metadata": {"transferjax": 3}}))
    with pytest.raises(CheckpointError, match="is damaged: its digests are no text"):
        open(tmp_path / "w")


def test_overwriting_leaves_nothing_of_the_old(tmp_path):
    save(tmp_path / "w", TREE, shard_bytes=50)
    with pytest.raises(CheckpointError, match="w' exists"):
        save(tmp_path / "w", TREE, shard_bytes=50)
    save(tmp_path / "w", {"a": np.ones(2)}, shard_bytes=50, overwrite=True)
    assert os.listdir(tmp_path / "w") == ["model.safetensors"] and os.listdir(tmp_path) == ["w"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("w.safetensors", {}, "shard_bytes writes a folder of safetensors, but .* says something else"),
        ("w", {"format": "npz"}, "shard_bytes writes a folder of safetensors, but .*format='npz' says something else"),
        ("w", {"shard_bytes": 0}, "shard_bytes is 0. Expected a whole number of bytes"),
        ("w", {"shard_bytes": 1e9}, "shard_bytes is 1000000000.0. Expected a whole number"),
        ("w", {"shard_bytes": "5GB"}, "shard_bytes is '5GB'. Expected a whole number"),
    ],
)
def test_wrong_limits(tmp_path, name, options, message):
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path / name, TREE, **{"shard_bytes": 100, **options})
    assert os.listdir(tmp_path) == []


def test_arrays_are_dealt_in_their_order():
    sizes = {name: np.zeros(n, np.int8) for name, n in {"a": 3, "b": 4, "c": 0, "d": 9, "e": 1, "f": 6}.items()}
    assert shards(sizes, 7) == [["a", "b", "c"], ["d"], ["e", "f"]]
