"""All or nothing."""

import errno
import os

import pytest

from transferjax._errors import CheckpointError
from transferjax.io import _beside
from transferjax.io._beside import beside


def _write(path, text):
    with open(path, "w") as file:
        file.write(text)


def _folder(path, text):
    os.mkdir(path)
    _write(os.path.join(path, "inner"), text)


def _state(path):
    return (path / "inner").read_text() if path.is_dir() else path.read_text()


@pytest.mark.parametrize("make", [_write, _folder])
def test_it_appears_at_once(tmp_path, make):
    path = tmp_path / "deep/er/x"
    with beside(str(path), overwrite=False) as new:
        assert os.path.dirname(new).startswith(str(path.parent / ".partial-x-"))
        make(new, "new")
        assert not path.exists()
    assert _state(path) == "new" and os.listdir(path.parent) == ["x"]


@pytest.mark.parametrize("make", [_write, _folder])
def test_overwriting_replaces_files_and_directories(tmp_path, make):
    make(tmp_path / "x", "old")
    with (
        pytest.raises(CheckpointError, match=r"'.*x' exists. Choose another path, or pass overwrite=True"),
        beside(str(tmp_path / "x"), overwrite=False),
    ):
        pass
    with beside(str(tmp_path / "x"), overwrite=True) as new:
        make(new, "new")
    assert _state(tmp_path / "x") == "new" and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize(
    ("before", "make", "message"),
    [
        (_folder, _write, "x' is a directory, and a file does not take its place. Choose another path"),
        (_write, _folder, "x' is a file, and a directory does not take its place. Choose another path"),
    ],
)
def test_a_file_and_a_directory_never_replace_each_other(tmp_path, before, make, message):
    before(tmp_path / "x", "old")
    with pytest.raises(CheckpointError, match=message), beside(str(tmp_path / "x"), overwrite=True) as new:
        make(new, "new")
    assert _state(tmp_path / "x") == "old" and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("before", [_write, _folder])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), CheckpointError("bad"), OSError(errno.ENOSPC, "No space left")])
def test_a_failure_leaves_the_old_state_and_no_leftovers(tmp_path, before, error):
    before(tmp_path / "x", "old")
    with (
        pytest.raises((KeyboardInterrupt, CheckpointError)) as caught,
        beside(str(tmp_path / "x"), overwrite=True) as new,
    ):
        before(new, "half")
        raise error
    if isinstance(error, OSError):
        expected = f"cannot write '{tmp_path / 'x'}': No space left. What was there before is unchanged."
        assert str(caught.value).startswith(expected)
    assert _state(tmp_path / "x") == "old" and os.listdir(tmp_path) == ["x"]


def test_a_failing_rename_puts_the_old_directory_back(tmp_path, monkeypatch):
    _folder(tmp_path / "x", "old")
    rename, calls = os.rename, []

    def failing(a, b):
        calls.append(b)
        if len(calls) == 2:
            raise PermissionError(errno.EACCES, "Permission denied")
        rename(a, b)

    monkeypatch.setattr(_beside.os, "rename", failing)
    with (
        pytest.raises(CheckpointError, match=r"cannot write '.*x': Permission denied"),
        beside(str(tmp_path / "x"), overwrite=True) as new,
    ):
        _folder(new, "new")
    assert _state(tmp_path / "x") == "old" and os.listdir(tmp_path) == ["x"]


def test_a_parent_that_is_a_file(tmp_path):
    _write(tmp_path / "f", "")
    with (
        pytest.raises(CheckpointError, match=r"cannot write '.*x': (File exists|Not a directory)"),
        beside(str(tmp_path / "f/x"), overwrite=False),
    ):
        pass
