"""open: which format a path holds, by its content."""

from __future__ import annotations

import dataclasses
import os
import posixpath
from typing import Any

from transferjax._errors import CheckpointError, listing
from transferjax.io._bytes import FileBytes, read
from transferjax.io._checkpoint import Checkpoint
from transferjax.io._hdf5 import MAGIC
from transferjax.io._keras import WEIGHTS, read_hdf5, read_keras
from transferjax.io._msgpack import looks_like, read_msgpack
from transferjax.io._npz import read_npz
from transferjax.io._reader import Reader
from transferjax.io._remote import local
from transferjax.io._safetensors import parse_json, read_safetensors
from transferjax.io._sharded import read_sharded
from transferjax.io._torch import read_stream, read_zip
from transferjax.io._zip import members


def open(path: str | os.PathLike[str], digest: str | None = None) -> Checkpoint:
    """Opens a checkpoint without reading its arrays.

    Understood, by content and not by name: files of ``torch.save`` (zip and older stream; nothing in them is executed,
    torch is not needed), safetensors, sharded weights (``*.index.json``), folders of Hugging Face (``config.json`` is
    then in the metadata), ``.npz`` (2 raw bytes per element are bfloat16, as big_vision stores it), msgpack of Flax,
    ``.keras``, ``.weights.h5`` and whole Keras models in ``.h5`` (neither Keras nor h5py is needed), and Orbax
    directories. Nested dicts of a torch file are joined by dots: ``state_dict.conv.weight``; Keras variables are
    called ``<layer>/kernel``, its optimizer's ``optimizer/...``.

    Args:
      path: a file or directory, ``~`` expanded; or ``"hf:org/name"``, ``"hf:org/name@revision"``, either with
        ``"/file"`` behind it (needs the extra ``hub``); or a URL of ``gs://``, ``s3://``, ``az://``, which
        ``etils.epath`` copies into the cache (``$TRANSFERJAX_CACHE``, else ``~/.cache/transferjax``) before anything is
        read.
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
    where = os.path.abspath(local(os.path.expanduser(os.fspath(path))))
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
    if head[:8] == MAGIC:
        return read_hdf5(file)
    if looks_like(head) or suffix == ".msgpack":
        return read_msgpack(file)
    # The first bytes are nobody's: if the name says what it should be, that reader's complaint is the clearest.
    expected = {".safetensors": read_safetensors, ".npz": _archive, ".pth": read_stream, ".pt": read_stream}
    if suffix in expected:
        return expected[suffix](file)
    raise CheckpointError(f"{file.where} is no checkpoint that is known here. Expected {_KNOWN}.")


_KNOWN = "a torch, safetensors, npz, msgpack or Keras file, or an Orbax directory"


def _archive(file: FileBytes) -> Reader:
    archive = members(file)
    if any(posixpath.basename(name) == "data.pkl" for name in archive):
        return read_zip(file, archive)
    if archive and all(name.endswith(".npy") for name in archive):
        return read_npz(file, archive)
    if file.path.lower().endswith(".npz") and archive:
        return read_npz(file, archive)
    if WEIGHTS in archive or file.path.lower().endswith(".keras"):
        return read_keras(file, archive)
    names = listing(sorted(archive), 3) if archive else "nothing"
    raise CheckpointError(f"{file.where} is an archive of {names}. Expected torch's data.pkl, or .npy arrays.")


_SAFE = ("model.safetensors", "model.safetensors.index.json")
_OTHER = ("pytorch_model.bin", "pytorch_model.bin.index.json", "flax_model.msgpack")
"""The weights in a Hugging Face folder, the preferred first; files of the same weights may lie beside each other."""


def _folder(path: str) -> Reader:
    names = sorted(os.listdir(path))
    indices = [name for name in names if name.endswith(".index.json")]
    weights = [name for name in names if name.endswith(".safetensors")]
    if len(indices) > 1 and not set(indices) <= {*_SAFE, *_OTHER}:
        raise CheckpointError(f"'{path}' holds {len(indices)} indices: {listing(indices)}. Open one of them.")
    found = [name for name in _SAFE if name in names] + [name for name in indices if name not in _SAFE + _OTHER]
    found += weights if len(weights) == 1 else []
    found += [name for name in _OTHER if name in names]
    if not found:
        from transferjax.io import _orbax  # tensorstore is heavy: only directories need it

        return _orbax.read_orbax(path)
    file = os.path.join(path, found[0])
    reader = read_sharded(FileBytes(file), _file) if found[0] in indices else _file(file)
    return dataclasses.replace(reader, beside=_configuration(path, names))


def _configuration(path: str, names: list[str]) -> dict[str, Any]:
    if "config.json" not in names:
        return {}
    file = FileBytes(os.path.join(path, "config.json"))
    if file.size > 1 << 26:
        raise CheckpointError(f"{file.where} has {file.size} bytes, more than any configuration.")
    return {"config": parse_json(bytes(read(file, 0, file.size)), file.where)}


def _neighbours(path: str) -> str:
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        return f" There is no directory '{folder}' either."
    from transferjax._errors import nearest_hint

    return nearest_hint(os.path.basename(path), sorted(os.listdir(folder))[:1000])
