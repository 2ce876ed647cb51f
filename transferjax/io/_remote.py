"""Checkpoints that are elsewhere: ``hf:`` names through huggingface_hub, ``gs://`` and ``s3://`` through epath.

Both end in a path of this machine: files are copied into a cache first, whole, so that every reader can seek.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

from transferjax._errors import CheckpointError
from transferjax.io._beside import beside

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_REMOTE = re.compile(r"(gs|s3|az)://[^/]")
_HUB = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?(/(?P<file>[^\0]+))?")
_MOST, _DEEPEST = 100_000, 16
FORMS = (
    ("*.safetensors", "*.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model*.bin.index.json"),
    ("flax_model*.msgpack", "flax_model*.msgpack.index.json"),
)
"""What of a repository is fetched: the first of these that it has, and ``config.json``."""


def local(path: str) -> str:
    """The path of a checkpoint on this machine; what is elsewhere is fetched into a cache first.

    Args:
      path: ``"hf:org/name"``, ``"hf:org/name@revision"``, either with ``"/file"`` behind it; a URL of ``gs://``,
        ``s3://`` or ``az://``; anything else is returned as it is.

    Raises:
      CheckpointError: it is a URL of another kind, the package that reaches it is missing, or it cannot be fetched.
    """
    if path.startswith("hf:") and not os.path.exists(path):
        return _from_hub(path)
    if _REMOTE.match(path):
        return _from_cloud(path)
    if _URL.match(path) and not os.path.exists(path):
        raise CheckpointError(
            f"'{path}' is a URL of a kind that is not opened here. Expected a path of this machine, 'hf:org/name', or "
            "a URL of gs://, s3:// or az://. Download it first, and open the file."
        )
    return path


def _from_hub(name: str) -> str:
    parts = _HUB.fullmatch(name)
    if parts is None or any(part in (".", "..") for part in re.split(r"[/\\@:]", name)):
        raise CheckpointError(f"'{name}' is no name of a repository. Write 'hf:org/name', 'hf:org/name@revision/file'.")
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            f"'{name}' is fetched by the package huggingface_hub, which is not installed. Install it with "
            "`pip install 'transferjax[hub]'`, or give the path of a folder that holds the files."
        ) from None
    repo, revision, file = parts["repo"], parts["revision"], parts["file"]
    with _fetching(name):
        if file is not None and not file.endswith(".index.json"):
            return os.path.abspath(huggingface_hub.hf_hub_download(repo, file, revision=revision))
        folder = ""
        for form in FORMS:
            wanted = [*form, "config.json"]
            folder = huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"]
            )
            if any(found != "config.json" for found in os.listdir(folder)):
                break
        return os.path.join(os.path.abspath(folder), file or "")


def _from_cloud(url: str) -> str:
    with _fetching(url):
        remote = _remote(url)
        if url.endswith(".index.json"):  # its shards lie beside it
            return os.path.join(_copied(remote.parent), remote.name)
        return _copied(remote)


def _remote(url: str) -> Any:
    try:
        from etils import epath
    except ImportError:
        raise CheckpointError(
            f"'{url}' is read through etils.epath. Install it: `pip install 'etils[epath]'`."
        ) from None
    return epath.Path(url)


def _copied(remote: Any) -> str:
    """Copies a file or folder into the cache, unless the same bytes are there: by name, size and time of change."""
    files = dict(_files(remote, "", 0))
    facts = [f"{name}\0{status.length}\0{status.mtime}\n" for name, (_, status) in sorted(files.items())]
    key = hashlib.sha256("".join([f"{remote}\n", *facts]).encode()).hexdigest()[:32]
    folder = os.path.join(_cache(), key)
    target = os.path.join(folder, remote.name or "checkpoint")
    if os.path.exists(target):
        return target
    with beside(folder) as room:
        for name, (path, _) in files.items():
            place = os.path.join(room, os.path.basename(target), *name.split("/")).rstrip("/")
            os.makedirs(os.path.dirname(place), exist_ok=True)
            with path.open("rb") as source, open(place, "wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 24)
    return target


def _files(remote: Any, name: str, depth: int) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """``(name below the first, (path, status))`` of every file; of a file itself under the name ``""``."""
    if not remote.is_dir():
        yield name, (remote, remote.stat())
        return
    for count, child in enumerate(sorted(remote.iterdir(), key=str)):
        if depth > _DEEPEST or count > _MOST or child.name in ("", ".", "..") or "\\" in child.name:
            raise CheckpointError(f"'{remote}' is no folder of a checkpoint: it has too many files, or strange names.")
        yield from _files(child, f"{name}/{child.name}" if name else child.name, depth + 1)


def _cache() -> str:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.environ.get("TRANSFERJAX_CACHE") or os.path.join(base, "transferjax")


@contextlib.contextmanager
def _fetching(name: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # each service has errors of its own
        words = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"'{name}' cannot be fetched: {words}") from error
