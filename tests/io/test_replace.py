"""What is never replaced, however much it is asked for."""

import os
import pathlib

import numpy as np
import pytest

from transferjax._errors import CheckpointError
from transferjax.io import open, save, transplant
from transferjax.surgery import plan

TREE = {"a": np.ones(2, np.float32)}


def _contents(folder):
    return {str(at.relative_to(folder)): at.read_bytes() if at.is_file() else None for at in folder.rglob("*")}


def _refused(folder, message, work):
    before = _contents(folder)
    with pytest.raises(CheckpointError, match=message):
        work()
    assert _contents(folder) == before


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("options", [{}, {"format": "orbax"}, {"shard_bytes": 100}])
def test_a_directory_of_anything_else_stays(tmp_path, options, overwrite):
    (tmp_path / "project").mkdir()
    (tmp_path / "project/thesis.tex").write_text("text")
    message = r"project' is not replaced: it is a directory that holds thesis.tex, which is no part of a checkpoint"
    _refused(tmp_path, message, lambda: save(tmp_path / "project", TREE, overwrite=overwrite, **options))


@pytest.mark.parametrize("format", ["npz", "safetensors", "msgpack"])
def test_a_directory_never_becomes_a_file(tmp_path, format):
    (tmp_path / "w").mkdir()
    message = "w' is a directory, and a file does not take its place. Choose another path"
    _refused(tmp_path, message, lambda: save(tmp_path / "w", TREE, format=format, overwrite=True))


@pytest.mark.parametrize("options", [{}, {"shard_bytes": 100}])
def test_a_file_never_becomes_a_directory(tmp_path, options):
    (tmp_path / "w").write_text("text")
    message = "w' is a file, and a directory does not take its place"
    _refused(tmp_path, message, lambda: save(tmp_path / "w", TREE, overwrite=True, **options))


@pytest.mark.parametrize("before", [{}, {"shard_bytes": 8}, {"shard_bytes": 10**9}])
@pytest.mark.parametrize("after", [{}, {"shard_bytes": 8}])
def test_checkpoints_and_empty_directories_are_replaced(tmp_path, before, after):
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty", {"b": TREE["a"]}, overwrite=True, **after)
    save(tmp_path / "w", {"b": TREE["a"], "c": np.zeros(3)}, metadata={"note": "old"}, **before)
    save(tmp_path / "w", TREE, overwrite=True, **after)
    assert list(open(tmp_path / "w")) == ["a"] and list(open(tmp_path / "empty")) == ["b"]


def test_a_checkpoint_of_orbax_itself_is_replaced(tmp_path, kit):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "w", {"b": np.ones(3)})
    save(tmp_path / "w", TREE, overwrite=True)
    assert list(open(tmp_path / "w")) == ["a"]


@pytest.mark.parametrize("options", [{}, {"shard_bytes": 8}])
def test_a_checkpoint_with_something_else_in_it_stays(tmp_path, options):
    save(tmp_path / "w", TREE, **options)
    (tmp_path / "w/config.json").write_text("{}")
    message = "w' is not replaced: it is a directory that holds .*config.json.*, which is no part of a checkpoint"
    _refused(tmp_path, message, lambda: save(tmp_path / "w", TREE, overwrite=True))


def test_a_folder_that_holds_checkpoints_stays(tmp_path):
    save(tmp_path / "runs/1", TREE)
    message = "runs' is not replaced: it is a directory that holds 1, which"
    _refused(tmp_path, message, lambda: save(tmp_path / "runs", TREE, overwrite=True))


@pytest.mark.parametrize("path", [".", "../here", "..", "../link"])
def test_the_current_directory_stays(tmp_path, monkeypatch, path):
    (tmp_path / "outer/here").mkdir(parents=True)
    (tmp_path / "outer/link").symlink_to(tmp_path / "outer/here")
    monkeypatch.chdir(tmp_path / "outer/here")
    message = "is, or holds, the current directory, and is not replaced. Choose another path"
    _refused(tmp_path, message, lambda: save(path, TREE, overwrite=True))


def test_a_current_directory_that_is_gone_is_no_hindrance(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    os.rmdir(tmp_path / "gone")
    save(tmp_path / "w.npz", TREE)
    save(tmp_path / "w.npz", {"b": TREE["a"]}, overwrite=True)
    monkeypatch.chdir(tmp_path)
    assert list(open("w.npz")) == ["b"]


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("w.npz", "w.npz", "w.npz' is, or holds, the source '.*w.npz', and is not replaced. Choose another path"),
        ("w", "w", "w' is, or holds, the source '.*w', and is not replaced"),
        ("deep/w.npz", "deep", "deep' is, or holds, the source '.*deep/w.npz', and is not replaced"),
        ("w", "w/transferjax", "w/transferjax' is a part of the source '.*w', and is not replaced. Choose"),
        ("w", "same.npz", "same.npz' is a part of the source"),
    ],
)
def test_the_source_stays(tmp_path, source, target, message):
    save(tmp_path / source, TREE)
    if target == "w/transferjax":
        (tmp_path / "w/transferjax").mkdir()
    if target == "same.npz":
        (tmp_path / target).symlink_to(tmp_path / "w/transferjax.json")
    opened = open(tmp_path / source)
    made = plan(opened.shapes, TREE)
    _refused(tmp_path, message, lambda: transplant(opened, made, tmp_path / target, overwrite=True))


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save("~/w.npz", TREE)
    assert open("~/w.npz").path == str(tmp_path / "w.npz") == open(pathlib.Path("~/w.npz")).path


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (
            lambda: save(TREE, "x.npz"),
            r"save\(\) expects the path of a file or directory, got dict: write save\(path, tr",
        ),
        (lambda: save(None, TREE), r"save\(\) expects the path of a file or directory, got NoneType"),
    ],
)
def test_no_path(work, message):
    with pytest.raises(CheckpointError, match=message):
        work()
