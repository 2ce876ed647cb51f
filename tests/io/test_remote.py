"""Names of checkpoints that are elsewhere, with local folders in their place."""

import builtins
import json
import os
import pathlib

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

from transferjax._errors import CheckpointError
from transferjax.io import open, save
from transferjax.io._remote import FORMS, local

TREE = {"w": np.arange(3.0)}


class Hub:
    """Stands for huggingface_hub: ``calls`` are what was asked of it, ``folder`` is the repository."""

    def __init__(self, folder, holds):
        self.folder, self.holds, self.calls = folder, holds, []

    def snapshot_download(self, repo, *, revision, allow_patterns, ignore_patterns):
        self.calls.append((repo, revision, tuple(allow_patterns), tuple(ignore_patterns)))
        (self.folder / "config.json").write_text('{"model_type": "tiny"}')
        if tuple(allow_patterns[:2]) == self.holds:
            save_file(TREE, self.folder / self.holds[0].replace("*", "model" if "*." in self.holds[0][:2] else ""))
        return str(self.folder)

    def hf_hub_download(self, repo, file, *, revision):
        self.calls.append((repo, revision, file))
        if "missing" in file:
            raise FileNotFoundError(f"404: {file}\n  was not found")
        save_file(TREE, self.folder / file)
        return str(self.folder / file)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    def install(holds=FORMS[0]):
        made = Hub(tmp_path, holds)
        monkeypatch.setattr("huggingface_hub.snapshot_download", made.snapshot_download)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", made.hf_hub_download)
        return made

    return install


@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize(("name", "revision"), [("hf:org/na.me-1", None), ("hf:org/na.me-1@v1.0", "v1.0")])
def test_a_repository_is_a_folder(hub, form, name, revision):
    made = hub(form)
    checkpoint = open(name)
    assert checkpoint["w"].tolist() == [0, 1, 2] and checkpoint.metadata["config"] == {"model_type": "tiny"}
    asked = [("org/na.me-1", revision, (*f, "config.json"), ("*/*",)) for f in FORMS[: FORMS.index(form) + 1]]
    assert made.calls == asked  # nothing but the weights that are read


def test_a_file_of_a_repository(hub, tmp_path):
    made = hub()
    assert open("hf:org/name@main/weights.safetensors")["w"].tolist() == [0, 1, 2]
    assert open("hf:org/name/weights.safetensors").path == str(tmp_path / "weights.safetensors")
    assert made.calls == [("org/name", "main", "weights.safetensors"), ("org/name", None, "weights.safetensors")]


def test_an_index_brings_its_shards(hub, tmp_path):
    made = hub()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "model.safetensors"}}))
    assert open("hf:org/name/model.safetensors.index.json")["w"].tolist() == [0, 1, 2]
    assert len(made.calls) == 1


def test_a_repository_without_weights(hub):
    hub(("nothing", "nothing"))
    with pytest.raises(CheckpointError, match="is a directory, but no checkpoint"):
        open("hf:org/name")


@pytest.mark.parametrize(
    "name", ["hf:name", "hf:", "hf:a/b@", "hf:a/b@r@s", "hf:../b", "hf:a/b/../../c", "hf:a/b/c\\..\\d"]
)
def test_names_that_are_none(hub, name):
    made = hub()
    with pytest.raises(CheckpointError, match=r"is no name of a repository. Write 'hf:org/name', 'hf:org/name@rev"):
        open(name)
    assert made.calls == []


def test_what_the_hub_says_is_passed_on(hub):
    hub()
    with pytest.raises(
        CheckpointError, match=r"'hf:org/name/missing\.bin' cannot be fetched: 404: missing.bin was not"
    ):
        open("hf:org/name/missing.bin")


@pytest.mark.parametrize(
    ("package", "name", "message"),
    [
        ("huggingface_hub", "hf:org/name", r"huggingface_hub, which is not installed. Install it.*transferjax\[hub\]"),
        ("etils", "gs://bucket/w.npz", r"'gs://bucket/w.npz' is read through etils.epath. Install it"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, package, name, message):
    original = builtins.__import__

    def without(module, *rest, **options):
        if module.split(".")[0] == package:
            raise ImportError(module)
        return original(module, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CheckpointError, match=message):
        open(name)


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """``gs://bucket`` is a local folder; ``opened`` are the files that were read from it."""
    bucket, opened = tmp_path / "bucket", []
    bucket.mkdir()

    class Remote:
        def __init__(self, url):
            self._url, self._path = url.rstrip("/"), epath.Path(url.replace("gs://bucket", str(bucket)).rstrip("/"))
            self.name = self._path.name

        def __str__(self):
            return self._url

        @property
        def parent(self):
            return Remote(self._url.rpartition("/")[0])

        def is_dir(self):
            return self._path.is_dir()

        def iterdir(self):
            return [Remote(f"{self._url}/{child.name}") for child in self._path.iterdir()]

        def stat(self):
            return self._path.stat()

        def open(self, mode):
            opened.append(self._url)
            return self._path.open(mode)

    monkeypatch.setattr("transferjax.io._remote._remote", Remote)
    monkeypatch.setenv("TRANSFERJAX_CACHE", str(tmp_path / "cache"))
    return bucket, opened


@pytest.mark.parametrize("name", ["w.safetensors", "w.npz", "orbax", "sharded", "sharded/model.safetensors.index.json"])
def test_files_and_folders_of_a_bucket(cloud, name):
    bucket, opened = cloud
    options = {"shard_bytes": 8} if "sharded" in name else {}
    save(bucket / name.split("/")[0], {**TREE, "v": np.ones(2)}, **options)
    for url in (f"gs://bucket/{name}", original_path(f"gs://bucket/{name}")):
        checkpoint = open(url)
        assert checkpoint["w"].tolist() == [0, 1, 2] and checkpoint.verified == "verified"
    assert len(opened) == len(set(opened)) > 0  # the second time it came from the cache


def original_path(url):
    """What a user may have in hand: an object whose ``os.fspath`` is the URL."""

    class Path(os.PathLike):
        def __fspath__(self):
            return url

    return Path()


def test_a_changed_file_is_fetched_again(cloud):
    bucket, opened = cloud
    for value in (1.0, 2.0):
        save(bucket / "w.npz", {"w": np.full(2, value)}, overwrite=True)
        os.utime(bucket / "w.npz", (value, value))
        assert open("gs://bucket/w.npz")["w"].tolist() == [value, value]
    assert opened == ["gs://bucket/w.npz"] * 2


def test_what_the_cloud_says_is_passed_on(cloud, tmp_path):
    with pytest.raises(CheckpointError, match=r"'gs://bucket/none.npz' cannot be fetched: .*No such file"):
        open("gs://bucket/none.npz")
    assert not (tmp_path / "cache").exists()


def test_folders_that_are_none(cloud, monkeypatch):
    bucket, _ = cloud
    (bucket / "a/b/c").mkdir(parents=True)
    (bucket / "a/b/c/d").write_text("")
    monkeypatch.setattr("transferjax.io._remote._DEEPEST", 1)
    with pytest.raises(CheckpointError, match="is no folder of a checkpoint: it has too many files, or strange names"):
        open("gs://bucket/a")


def test_urls_go_to_epath():
    from transferjax.io._remote import _remote

    path = _remote("s3://bucket/a/w.npz")
    assert (os.fspath(path.parent), path.name) == ("s3://bucket/a", "w.npz")


@pytest.mark.parametrize("url", ["https://host/w.safetensors", "ftp://a/b", "file:///w.npz"])
def test_urls_of_another_kind(url):
    message = (
        rf"'{url}' is a URL of a kind that is not opened here. Expected .*'hf:org/name', or a URL of gs://, s3:// or"
    )
    with pytest.raises(CheckpointError, match=message):
        open(url)


def test_ordinary_paths_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf:org").mkdir()
    pathlib.Path("hf:org/name").touch()
    for path in ("w.npz", "/a/b", "hf:org/name", "gs:/a"):
        assert local(path) == path


def test_the_cache_is_in_the_home_of_the_user(monkeypatch):
    from transferjax.io._remote import _cache

    for name in ("TRANSFERJAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert _cache() == "/home/somebody/.cache/transferjax"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert _cache() == "/x/transferjax"
