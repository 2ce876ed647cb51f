"""Checkpoint: names, slices, identity."""

import hashlib
from collections.abc import Mapping

import h5py
import numpy as np
import pytest

from transferjax._errors import CheckpointError
from transferjax.io import open, save


@pytest.fixture
def checkpoint(tmp_path, tree):
    save(tmp_path / "w.npz", tree, format="npz", metadata={"epoch": 3})
    return open(tmp_path / "w.npz")


def test_it_is_a_mapping_of_names(checkpoint):
    assert list(checkpoint)[:2] == ["blocks/0/scale", "blocks/1/scale"] and len(checkpoint) == 7
    assert "head/mask" in checkpoint and "head" not in checkpoint and 3 not in checkpoint
    assert checkpoint.shapes["stem/kernel"].shape == (3, 5)
    assert checkpoint.metadata == {"epoch": 3}
    assert repr(checkpoint).endswith("w.npz', npz, 7 arrays, verified)")


def test_it_is_read_only_when_asked(checkpoint, tree):
    assert isinstance(checkpoint, Mapping) and list(checkpoint.keys()) == list(checkpoint)
    items = dict(checkpoint.items())
    assert list(items) == list(checkpoint) and items["stem/bias"].tolist() == tree["stem"]["bias"].tolist()
    assert [array.shape for array in checkpoint.values()] == [checkpoint.shapes[name].shape for name in checkpoint]
    assert checkpoint.get("stem/kernal") is None and checkpoint.get(3, "none") == "none"
    assert checkpoint.get("stem/bias").tolist() == tree["stem"]["bias"].tolist()


def test_it_is_equal_to_itself_alone(checkpoint):
    other = open(checkpoint.path)
    assert checkpoint == checkpoint and checkpoint != other and checkpoint != {}
    assert len({checkpoint, other, checkpoint}) == 2


@pytest.mark.parametrize("name", ["stem/kernal", 3, ["stem"]])
def test_only_what_is_there_is_sliceable(checkpoint, name):
    assert checkpoint.sliceable("stem/kernel")
    with pytest.raises(CheckpointError, match=r"has no array '.*' among its 7"):
        checkpoint.sliceable(name)


@pytest.mark.parametrize("name", ["stem/kernal", 3])
def test_an_unknown_name_gets_the_nearest(checkpoint, name):
    with pytest.raises(CheckpointError, match=f"has no array '{name}' among its 7. Nearest: "):
        checkpoint[name]
    if name != 3:
        with pytest.raises(CheckpointError, match="Nearest: stem/kernel"):
            checkpoint.read(name, 0)


def test_what_is_read_belongs_to_the_reader(checkpoint, tree):
    for index in (None, ..., (0, slice(None)), (slice(None, None, -1),)):
        first = checkpoint.read("stem/kernel", index)
        assert first.flags.writeable and first.flags.c_contiguous
        first[...] = 0
        np.testing.assert_array_equal(checkpoint.read("stem/kernel", index), tree["stem"]["kernel"][index or ...])


def test_an_index_outside(checkpoint):
    with pytest.raises(CheckpointError, match=r"index 9 is outside 'stem/kernel', which has shape \(3, 5\)"):
        checkpoint.read("stem/kernel", 9)


def test_the_fingerprint_is_that_of_the_content(tmp_path, tree):
    prints = {}
    for format in ("npz", "safetensors", "orbax"):
        report = save(tmp_path / format, tree, format=format, metadata={"written as": format})
        prints[format] = open(tmp_path / format).fingerprint()
        assert report.metadata["fingerprint"] == prints[format]
    assert len(set(prints.values())) == 1 and len(prints["npz"]) == 64
    tree["stem"]["bias"][0] += 1
    save(tmp_path / "other.npz", tree, format="npz")
    assert open(tmp_path / "other.npz").fingerprint() != prints["npz"]


def test_the_fingerprint_of_a_foreign_file_is_its_sha256(tmp_path):
    np.savez(tmp_path / "w.npz", w=np.ones(3))
    expected = hashlib.sha256((tmp_path / "w.npz").read_bytes()).hexdigest()
    assert open(tmp_path / "w.npz").fingerprint() == expected


def test_a_stored_fingerprint_reads_no_payload(tmp_path, monkeypatch):
    save(tmp_path / "w.safetensors", {"w": np.zeros(1 << 20)}, format="safetensors")
    checkpoint = open(tmp_path / "w.safetensors")
    monkeypatch.setattr("transferjax.io._bytes.FileBytes.read_into", None)
    assert checkpoint.fingerprint() == checkpoint.fingerprint()


def test_a_digest_is_checked_before_anything_is_served(tmp_path, kit):
    path = kit.fixtures / "torch/stream.pth"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert open(path).verified == "unverified"
    for written in (digest, digest.upper(), f"sha256:{digest}"):
        assert open(path, digest=written).verified == "verified"
    with pytest.raises(CheckpointError, match=f"is not the expected file: its sha256 is {digest}, expected {'0' * 64}"):
        open(path, digest="0" * 64)
    for wrong in ("abc", "g" * 64):
        with pytest.raises(CheckpointError, match=f"digest '{wrong}' is no sha256. Expected 64 hexadecimal digits"):
            open(path, digest=wrong)


def test_a_digest_that_is_no_text(checkpoint):
    with pytest.raises(CheckpointError, match=r"digest is int\. Expected text of 64 hexadecimal digits"):
        open(checkpoint.path, digest=5)


def test_our_files_take_the_fingerprint_or_the_sha256(tmp_path, tree):
    save(tmp_path / "w.npz", tree, format="npz")
    file = hashlib.sha256((tmp_path / "w.npz").read_bytes()).hexdigest()
    assert open(tmp_path / "w.npz", digest=file).fingerprint() != file
    open(tmp_path / "w.npz", digest=open(tmp_path / "w.npz").fingerprint())
    with pytest.raises(CheckpointError, match="is not the expected file"):
        open(tmp_path / "w.npz", digest="1" * 64)


def test_directories_take_their_fingerprint(tmp_path, tree):
    save(tmp_path / "w", tree)
    (tmp_path / "w/transferjax.json").unlink()
    digest = open(tmp_path / "w").fingerprint()
    assert open(tmp_path / "w").verified == "unverified" and open(tmp_path / "w", digest=digest).verified == "verified"
    with pytest.raises(CheckpointError, match="is not the expected file"):
        open(tmp_path / "w", digest="1" * 64)


@pytest.mark.parametrize("format", ["npz", "safetensors", "msgpack", "orbax"])
def test_an_array_is_read_into_memory_that_is_there(format, tmp_path, tree):
    save(tmp_path / "w", tree, format=format)
    checkpoint = open(tmp_path / "w")
    for path in checkpoint:
        expected = checkpoint[path]
        out = np.empty_like(expected)
        out.reshape(-1).view(np.uint8)[:] = 0xA5  # what was there before is not what is expected
        assert checkpoint.read_into(path, out) is None
        assert out.tobytes() == expected.tobytes()


def test_compressed_chunks_too(tmp_path):
    values = np.arange(300, dtype=np.float32).reshape(20, 15)
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file.create_dataset("w", data=values, chunks=(8, 7), compression="gzip", shuffle=True)
    out = np.full_like(values, -1)
    open(tmp_path / "w.h5").read_into("w", out)
    np.testing.assert_array_equal(out, values)


@pytest.mark.parametrize("file", ["torch/stream.pth", "keras/nested.weights.h5", "keras/text.keras"])
def test_foreign_files_too(file, kit):
    checkpoint = open(kit.fixtures / file)
    for path in checkpoint:
        out = np.empty(checkpoint.shapes[path].shape, checkpoint.shapes[path].dtype)
        out.reshape(-1).view(np.uint8)[:] = 0xA5
        checkpoint.read_into(path, out)
        assert out.tobytes() == checkpoint[path].tobytes()


def test_memory_must_fit(checkpoint):
    fixed = np.zeros((3, 5), np.float32)
    fixed.flags.writeable = False
    wrong = [np.zeros((5, 3), np.float32), np.zeros((3, 5)), np.zeros((5, 3), np.float32).T, fixed, [[0.0]]]
    for out in wrong:
        with pytest.raises(CheckpointError) as error:
            checkpoint.read_into("stem/kernel", out)
        assert "'stem/kernel' cannot be read into" in str(error.value)
        assert "Expected a writable numpy array in C order: np.empty((3, 5), 'float32')" in str(error.value)
    with pytest.raises(CheckpointError, match=r"has no array 'stem/kernal' among its 7\. Nearest: stem/kernel"):
        checkpoint.read_into("stem/kernal", fixed)


def test_damage_is_told_when_an_array_is_read_into_memory(tmp_path):
    save(tmp_path / "w.safetensors", {"w": np.arange(1000.0)})
    data = bytearray((tmp_path / "w.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "w.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"'w' in .* is damaged: block 0 of 1 does not match its digest"):
        open(tmp_path / "w.safetensors").read_into("w", np.empty(1000))
