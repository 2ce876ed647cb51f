"""Damage of every kind and format: the right arrays, or a CheckpointError; never another exception."""

import json
import pathlib
import shutil

import h5py
import ml_dtypes
import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import save_file

from transferjax import io
from transferjax._errors import CheckpointError

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
OWN = ("safetensors", "npz", "msgpack")
FOREIGN = {
    "zip.pth": lambda path: shutil.copy(FIXTURES / "torch/zip.pth", path),
    "nested.pth": lambda path: shutil.copy(FIXTURES / "torch/nested.pth", path),
    "stream.pth": lambda path: shutil.copy(FIXTURES / "torch/stream.pth", path),
    "stream4.pth": lambda path: shutil.copy(FIXTURES / "torch/stream4.pth", path),
    "plain.safetensors": lambda path: save_file(_numpy_tree(), path),
    "plain.npz": lambda path: np.savez(path, **_numpy_tree()),
    "packed.npz": lambda path: np.savez_compressed(path, **_numpy_tree()),
    "big_vision.npz": lambda path: np.savez(path, **{"params/a/kernel": np.ones(40, ml_dtypes.bfloat16)}),
    "flax.msgpack": lambda path: path.write_bytes(serialization.msgpack_serialize({"p": _numpy_tree(), "step": 3})),
    "chunked.msgpack": lambda path: path.write_bytes(_chunked()),
    "packed.h5": lambda path: _packed(path),
    **{
        name: lambda path: shutil.copy(FIXTURES / f"keras/{path.name}", path)
        for name in ("nested.h5", "images.weights.h5", "text.keras", "half.keras")
    },
}
SLOW = (".h5", ".keras")
"""Of these a file has some 50 KB of structure, and each case takes 20 ms."""


def _chunked():
    parts = {str(n): np.arange(20.0) + 20 * n for n in range(3)}
    whole = {"__msgpack_chunked_array__": True, "shape": {"0": 3, "1": 20}, "chunks": parts}
    return serialization.msgpack_serialize({"a": whole, "b": np.ones(3, np.int8)})


def _packed(path):
    with h5py.File(path, "w") as file:
        for name, array in _numpy_tree().items():
            file[name] = array
        file.create_dataset("z", data=np.arange(90.0), chunks=(20,), compression="gzip", shuffle=True)
        file.attrs["note"] = "text"


def _numpy_tree():
    return {"a": np.arange(60.0).reshape(3, 20), "b/c": np.arange(5, dtype=np.int16), "d": np.array(1, np.int8)}


@pytest.mark.parametrize("format", OWN)
def test_our_files_never_serve_damage(kit, tmp_path, format):
    _fuzz_own(kit, tmp_path, format, range(400))


@pytest.mark.slow
@pytest.mark.parametrize("format", OWN)
def test_our_files_never_serve_damage_2000(kit, tmp_path, format):
    _fuzz_own(kit, tmp_path, format, range(400, 2400))


def _fuzz_own(kit, folder, format, seeds):
    whole = folder / f"whole.{format}"
    io.save(whole, kit.small_tree(), format=format)
    original, data = kit.read_all(whole), whole.read_bytes()
    raised = 0
    for seed in seeds:
        hurt = folder / f"hurt.{format}"
        hurt.write_bytes(kit.damaged(data, seed))
        raised += kit.survives(hurt, original)
    assert raised > len(seeds) / 2


@pytest.mark.parametrize("format", OWN)
def test_every_truncation_of_our_files_raises(kit, tmp_path, format):
    whole = tmp_path / f"whole.{format}"
    io.save(whole, kit.small_tree(), format=format)
    data = whole.read_bytes()
    for end in [*range(0, len(data), 7), len(data) - 1]:
        hurt = tmp_path / f"hurt.{format}"
        hurt.write_bytes(data[:end])
        assert kit.survives(hurt), f"a file cut at {end} of {len(data)} was accepted"


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_raise_only_checkpoint_errors(kit, tmp_path, name):
    _fuzz_foreign(kit, tmp_path, name, range(100 if name.endswith(SLOW) else 400))


@pytest.mark.slow
@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_raise_only_checkpoint_errors_2000(kit, tmp_path, name):
    _fuzz_foreign(kit, tmp_path, name, range(400, 2400))


def _fuzz_foreign(kit, folder, name, seeds):
    FOREIGN[name](folder / name)
    data = (folder / name).read_bytes()
    checked = io.open(folder / name).verified == "verified"  # by checksums of the archive
    original = kit.read_all(folder / name) if checked else None
    hurt = folder / f"hurt{pathlib.Path(name).suffix}"
    raised = 0
    for seed in seeds:
        hurt.write_bytes(kit.damaged(data, seed))
        raised += kit.survives(hurt, original)
    assert raised > len(seeds) / 4


@pytest.mark.parametrize("name", FOREIGN)
def test_every_truncation_of_foreign_files_raises(kit, tmp_path, name):
    FOREIGN[name](tmp_path / name)
    data = (tmp_path / name).read_bytes()
    hurt = tmp_path / f"hurt{pathlib.Path(name).suffix}"
    for end in [*range(0, len(data), max(11, len(data) // 60 if name.endswith(SLOW) else 0)), len(data) - 1]:
        hurt.write_bytes(data[:end])
        assert kit.survives(hurt), f"a file cut at {end} of {len(data)} was accepted"


def test_a_checksummed_archive_never_serves_a_damaged_payload(kit, tmp_path):
    original, data = kit.read_all(FIXTURES / "torch/zip.pth"), (FIXTURES / "torch/zip.pth").read_bytes()
    for position in range(2000, len(data), 13):
        hurt = bytearray(data)
        hurt[position] ^= 16
        (tmp_path / "hurt.pth").write_bytes(hurt)
        try:
            found = kit.read_all(tmp_path / "hurt.pth")
        except CheckpointError:
            continue
        assert all(found[k].tobytes() == original[k].tobytes() for k in found)


@pytest.fixture(scope="module")
def sharded(kit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    io.save(folder / "own", kit.small_tree(), shard_bytes=40)
    shutil.copytree(folder / "own", folder / "foreign")
    index = folder / "foreign/model.safetensors.index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "metadata": {"total_size": 1}}))
    return folder


@pytest.mark.parametrize("which", ["own", "foreign"])
def test_sharded_weights(kit, sharded, tmp_path, which):
    _fuzz_folder(kit, sharded, which, tmp_path, range(100))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["own", "foreign"])
def test_sharded_weights_2000(kit, sharded, tmp_path, which):
    _fuzz_folder(kit, sharded, which, tmp_path, range(100, 2100))


@pytest.fixture(scope="module")
def orbax(kit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("orbax")
    io.save(folder / "own", kit.small_tree())
    shutil.copytree(folder / "own", folder / "foreign")
    (folder / "foreign/transferjax.json").unlink()
    return folder


def _fuzz_folder(kit, folder, which, room, seeds):
    original = kit.read_all(folder / which)
    files = sorted(p.relative_to(folder / which) for p in (folder / which).rglob("*") if p.is_file())
    raised = 0
    for seed in seeds:
        hurt = room / "hurt"
        shutil.rmtree(hurt, ignore_errors=True)
        shutil.copytree(folder / which, hurt)
        file = hurt / files[seed % len(files)]
        if file.stat().st_size:
            file.write_bytes(kit.damaged(file.read_bytes(), seed))
        else:
            file.unlink()
        raised += kit.survives(hurt, original if which == "own" else None)
    assert raised


@pytest.mark.parametrize("which", ["own", "foreign"])
def test_orbax_directories(kit, orbax, tmp_path, which):
    _fuzz_folder(kit, orbax, which, tmp_path, range(250))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["own", "foreign"])
def test_orbax_directories_2000(kit, orbax, tmp_path, which):
    _fuzz_folder(kit, orbax, which, tmp_path, range(250, 2250))
