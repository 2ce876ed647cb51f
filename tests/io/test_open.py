"""open knows a format by its content."""

import json
import os
import zipfile

import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import save_file

from transferjax._errors import CheckpointError
from transferjax.io import open, save


@pytest.mark.parametrize("format", ["npz", "safetensors"])
@pytest.mark.parametrize("name", ["w", "w.bin", "w.pth", "w.safetensors", "w.npz"])
def test_the_name_does_not_matter(tmp_path, tree, format, name):
    save(tmp_path / "w", tree, format=format)
    (tmp_path / "w").rename(tmp_path / f"renamed-{name}")
    assert open(tmp_path / f"renamed-{name}").format == format


def test_torch_files_of_any_name(tmp_path, kit):
    for name, format in (("zip.pth", "torch"), ("stream.pth", "torch-legacy"), ("stream4.pth", "torch-legacy")):
        (tmp_path / "model.bin").write_bytes((kit.fixtures / "torch" / name).read_bytes())
        assert open(str(tmp_path / "model.bin")).format == format


def test_relative_paths_become_absolute(tmp_path, tree, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert save("w.npz", tree, format="npz").metadata["path"] == str(tmp_path / "w.npz")
    assert open("w.npz").path == os.path.join(tmp_path, "w.npz")


def test_no_path():
    with pytest.raises(CheckpointError, match=r"open\(\) expects the path of a file or directory, got NoneType"):
        open(None)


def test_nothing_there(tmp_path):
    (tmp_path / "weights.npz").touch()
    with pytest.raises(CheckpointError, match=r"there is nothing at '.*weihgts\.npz'. Nearest: weights\.npz"):
        open(tmp_path / "weihgts.npz")
    with pytest.raises(CheckpointError, match=r"There is no directory '.*no' either"):
        open(tmp_path / "no/w.npz")


@pytest.mark.parametrize("name", ["w", "w.pth", "w.pt", "w.npz", "w.safetensors", "model.safetensors.index.json"])
def test_an_empty_file(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=rf"{name}' is empty"):
        open(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "w",
            b"hello",
            "is no checkpoint that is known here. Expected a torch, safetensors, npz, msgpack or Keras",
        ),
        ("w.json", b'{"a": 1}', "is no index of shards"),
        (
            "w.h5",
            b"\x89HDF\r\n\x1a\n" + bytes(50),
            "damaged, or no HDF5 file as Keras writes it: its addresses do not have 8 bytes",
        ),
        ("w.safetensors", b"hello", "truncated or damaged: expected 8 bytes"),
        ("w.safetensors", b"hello, this is text", "its header claims"),
        ("w.npz", b"hello, this is text", "is no complete zip archive"),
        ("w.pth", b"hello, this is text", "pickle opcode 0x68|damaged pickle"),
        ("w.pt", b"hello, this is text", "damaged pickle"),
    ],
)
def test_something_else(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        open(tmp_path / name)


def test_an_archive_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(CheckpointError, match=r"is an archive of config\.json. Expected torch's data\.pkl, or \.npy"):
        open(tmp_path / "w.zip")
    with zipfile.ZipFile(tmp_path / "e.zip", "w"):
        pass
    with pytest.raises(CheckpointError, match="is an archive of nothing"):
        open(tmp_path / "e.zip")


def test_a_folder_with_one_safetensors_file(tmp_path, tree):
    save(tmp_path / "model.safetensors", tree, format="safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert len(open(tmp_path)) == 7


def _hugging_face(folder, names):
    """A folder as Hugging Face has them; the array says which of its files was read."""
    for number, name in enumerate(names):
        tree = {"w": np.full(2, number, np.float32)}
        if name.endswith(".json"):
            shard = name.replace(".index.json", "").replace(".", "-00001-of-00001.")
            save_file(tree, folder / shard)
            (folder / name).write_text(json.dumps({"weight_map": {"w": shard}}))
        elif name.endswith(".msgpack"):
            (folder / name).write_bytes(serialization.msgpack_serialize(tree))
        else:
            save_file(tree, folder / name)  # the content decides, not the name
    (folder / "config.json").write_text('{"hidden_size": 2}')
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["pytorch_model.bin", "flax_model.msgpack", "model.safetensors"], 2),
        (["pytorch_model.bin.index.json", "model.safetensors.index.json"], 1),
        (["flax_model.msgpack", "pytorch_model.bin.index.json"], 1),
        (["flax_model.msgpack", "pytorch_model.bin"], 1),
        (["pytorch_model.bin", "weights.safetensors"], 1),
        (["flax_model.msgpack"], 0),
    ],
)
def test_folders_of_hugging_face(tmp_path, names, read):
    _hugging_face(tmp_path, names)
    checkpoint = open(tmp_path)
    assert checkpoint["w"].tolist() == [read, read] and checkpoint.metadata["config"] == {"hidden_size": 2}


def test_a_configuration_beside_our_own_files(tmp_path, tree):
    save(tmp_path / "model.safetensors", tree, metadata={"epoch": 3})
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert open(tmp_path).metadata == {"epoch": 3, "config": {"a": 1}} and open(tmp_path).verified == "verified"
    (tmp_path / "config.json").write_text('{"a": 1')
    with pytest.raises(CheckpointError, match=r"config.json' is damaged: it is no JSON"):
        open(tmp_path)
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 27)
    with pytest.raises(CheckpointError, match="has 134217728 bytes, more than any configuration"):
        open(tmp_path)


def test_a_folder_that_is_no_checkpoint(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"is a directory, but no checkpoint. Expected an Orbax directory"):
        open(tmp_path)
