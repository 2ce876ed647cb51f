"""The manifest: digests of blocks, and of itself."""

import json

import numpy as np
import pytest

from transferjax._errors import CheckpointError
from transferjax.io import _manifest, open, save
from transferjax.io._manifest import Manifest, dtype_of, encode, leaf_facts

BODY = encode({"w": leaf_facts(np.arange(4.0), None)}, {"note": 1})


def _changed(**facts):
    body = {k: v for k, v in json.loads(BODY).items() if k != "sha256"} | facts
    return json.dumps({**body, "sha256": _manifest._text_digest(body)})


def test_it_round_trips():
    found = Manifest(BODY, "here")
    assert found.metadata == {"note": 1} and found.leaves["w"]["shape"] == [4]


@pytest.mark.parametrize(
    "text", ["{}", "[]", "3", BODY.replace("float64", "float32"), BODY.replace('"note":1', '"note":2')]
)
def test_it_covers_itself(text):
    with pytest.raises(CheckpointError, match="manifest of here does not match its own digest"):
        Manifest(text, "here")


def test_no_json():
    with pytest.raises(CheckpointError, match="manifest of here is damaged: it is no JSON"):
        Manifest("{", "here")


def test_a_newer_version():
    with pytest.raises(CheckpointError, match=r"written by a newer version \(manifest 9\); this one reads 1"):
        Manifest(_changed(version=9), "here")


@pytest.mark.parametrize("block", [0, -1, "16", 1.5])
def test_blocks_of_no_size(block):
    with pytest.raises(CheckpointError, match=f"has blocks of {block} bytes"):
        Manifest(_changed(block=block), "here")


def test_an_unknown_dtype():
    assert dtype_of("bfloat16", "here").itemsize == 2
    with pytest.raises(CheckpointError, match="here names the dtype 'float99', which is not known here"):
        dtype_of("float99", "here")


@pytest.fixture
def blocked(tmp_path, monkeypatch):
    """A file whose leaf has 10 blocks of two rows."""
    monkeypatch.setattr(_manifest, "BLOCK", 64)
    array = np.arange(160, dtype=np.float32).reshape(20, 8)
    save(tmp_path / "w.safetensors", {"w": array}, format="safetensors")
    return tmp_path / "w.safetensors", array


def test_a_slice_verifies_the_blocks_it_touches_and_no_others(blocked):
    path, array = blocked
    assert len(open(path)._manifest.leaves["w"]["sha256"]) == 10
    for index in np.s_[3:5, 2], np.s_[::-7], np.s_[19], np.s_[..., 1:3]:
        np.testing.assert_array_equal(open(path).read("w", index), array[index])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # in the last row
    path.write_bytes(data)
    np.testing.assert_array_equal(open(path).read("w", np.s_[3:5, 2]), array[3:5, 2])
    for index in np.s_[18], np.s_[:, 0], None:
        with pytest.raises(CheckpointError, match=r"'w' in .* is damaged: block 9 of 10 does not match its digest"):
            open(path).read("w", index)


def test_a_block_is_16_mebibytes(tmp_path):
    array = np.zeros((5, 1 << 21), np.float32)
    facts = leaf_facts(array, None)
    assert _manifest.BLOCK == 1 << 24 and len(facts["sha256"]) == 3


def test_leaves_that_the_file_lacks_or_has_otherwise(blocked):
    path, _ = blocked
    checkpoint = open(path)
    entries = checkpoint._reader.entries
    with pytest.raises(CheckpointError, match="'v' is only in one of the file and its manifest"):
        checkpoint._manifest.check({**entries, "v": entries["w"]})
    checkpoint._manifest.leaves["w"]["shape"] = [8, 20]
    with pytest.raises(
        CheckpointError, match=r"is damaged: the manifest says \(8, 20\) float32, the file \(20, 8\) float32"
    ):
        checkpoint._manifest.check(entries)
