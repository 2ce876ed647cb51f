"""open knows a format by its content."""

import os
import zipfile

import pytest

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
        ("w", b"hello", "is no checkpoint that is known here. Expected a torch, safetensors or npz file, or an Orbax"),
        ("w.json", b'{"a": 1}', "is no index of shards"),
        ("w.h5", b"\x89HDF\r\n\x1a\n" + bytes(50), "is an HDF5 file, which is not read here"),
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
    with zipfile.ZipFile(tmp_path / "w.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(CheckpointError, match=r"is an archive of config\.json. Expected torch's data\.pkl, or \.npy"):
        open(tmp_path / "w.keras")
    with zipfile.ZipFile(tmp_path / "e.zip", "w"):
        pass
    with pytest.raises(CheckpointError, match="is an archive of nothing"):
        open(tmp_path / "e.zip")


def test_a_folder_with_one_safetensors_file(tmp_path, tree):
    save(tmp_path / "model.safetensors", tree, format="safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert len(open(tmp_path)) == 7


def test_a_folder_that_is_no_checkpoint(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"is a directory, but no checkpoint. Expected an Orbax directory"):
        open(tmp_path)
