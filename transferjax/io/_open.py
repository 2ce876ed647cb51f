"""open: which format a path holds, by its content."""

from __future__ import annotations

import os
import posixpath

from transferjax._errors import CheckpointError, listing
from transferjax.io._bytes import FileBytes, read
from transferjax.io._checkpoint import Checkpoint
from transferjax.io._npz import read_npz
from transferjax.io._reader import Reader
from transferjax.io._safetensors import read_safetensors
from transferjax.io._sharded import read_sharded
from transferjax.io._torch import read_stream, read_zip
from transferjax.io._zip import members


def open(path: str | os.PathLike[str], digest: str | None = None) -> Checkpoint:
    """Opens a checkpoint without reading its arrays.

    Understood, by content and not by name: files of ``torch.save`` (zip and older stream; nothing in them is executed,
    torch is not needed), safetensors, sharded weights (``*.index.json`` or the folder that holds it), ``.npz``, and
    Orbax directories. Nested dicts of a torch file are joined by dots: ``state_dict.conv.weight``.

    Args:
      path: a file or directory.
      digest: the expected sha256 of the file, or a ``fingerprint()``; checked before anything is served.

    Returns:
      A :class:`Checkpoint`.

    Raises:
      CheckpointError: nothing is there, it is damaged or unknown, it names forbidden Python objects, or the digest
        differs.

    >>> import tempfile, numpy as np
    >>> file = tempfile.mkdtemp() + "/weights.npz"
    >>> np.savez(file, kernel=np.zeros((3, 4), np.float32))
    >>> open(file).shapes
    {'kernel': ShapeDtypeStruct(shape=(3, 4), dtype=float32)}
    """
    if not isinstance(path, str | os.PathLike):
        raise CheckpointError(f"open() expects the path of a file or directory, got {type(path).__name__}.")
    where = os.path.abspath(os.fspath(path))
    if not os.path.exists(where):
        raise CheckpointError(f"there is nothing at '{where}'.{_neighbours(where)}")
    checkpoint = Checkpoint(where, _folder(where) if os.path.isdir(where) else _file(where))
    if digest is not None:
        checkpoint.require(digest)
    return checkpoint


def _file(path: str) -> Reader:
    file = FileBytes(path)
    if not file.size:
        raise CheckpointError(f"{file.where} is empty.")
    head = bytes(read(file, 0, min(32, file.size)))
    suffix = os.path.splitext(path)[1].lower()
    if head[:4] in (b"PK\3\4", b"PK\5\6"):
        return _archive(file)
    if head.lstrip()[:1] == b"{" and suffix == ".json":
        return read_sharded(file, _file)
    # Before the pickle: a header of 640 bytes starts like one, while a pickle never claims a length that fits.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= file.size - 8:
        return read_safetensors(file)
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return read_stream(file)
    if head[8:9] == b"{":
        return read_safetensors(file)
    if head[:8] == b"\x89HDF\r\n\x1a\n":
        raise CheckpointError(f"{file.where} is an HDF5 file, which is not read here. Expected {_KNOWN}.")
    # The first bytes are nobody's: if the name says what it should be, that reader's complaint is the clearest.
    expected = {".safetensors": read_safetensors, ".npz": _archive, ".pth": read_stream, ".pt": read_stream}
    if suffix in expected:
        return expected[suffix](file)
    raise CheckpointError(f"{file.where} is no checkpoint that is known here. Expected {_KNOWN}.")


_KNOWN = "a torch, safetensors or npz file, or an Orbax directory"


def _archive(file: FileBytes) -> Reader:
    archive = members(file)
    if any(posixpath.basename(name) == "data.pkl" for name in archive):
        return read_zip(file, archive)
    if archive and all(name.endswith(".npy") for name in archive):
        return read_npz(file, archive)
    if file.path.lower().endswith(".npz") and archive:
        return read_npz(file, archive)
    names = listing(sorted(archive), 3) if archive else "nothing"
    raise CheckpointError(f"{file.where} is an archive of {names}. Expected torch's data.pkl, or .npy arrays.")


def _folder(path: str) -> Reader:
    names = sorted(os.listdir(path))
    indices = [name for name in names if name.endswith(".index.json")]
    weights = [name for name in names if name.endswith(".safetensors")]
    if len(indices) > 1:
        raise CheckpointError(f"'{path}' holds {len(indices)} indices: {listing(indices)}. Open one of them.")
    if indices:
        return read_sharded(FileBytes(os.path.join(path, indices[0])), _file)
    if len(weights) == 1:
        return _file(os.path.join(path, weights[0]))
    from transferjax.io import _orbax  # tensorstore is heavy: only directories need it

    return _orbax.read_orbax(path)


def _neighbours(path: str) -> str:
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        return f" There is no directory '{folder}' either."
    from transferjax._errors import nearest_hint

    return nearest_hint(os.path.basename(path), sorted(os.listdir(folder))[:1000])
