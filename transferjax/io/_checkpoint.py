"""Checkpoint: named arrays in a file or directory, read when asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from transferjax._errors import CheckpointError, describe, nearest_hint
from transferjax.io._boxes import c_strides, normalise
from transferjax.io._bytes import once as read_once
from transferjax.io._manifest import Manifest, dtype_of
from transferjax.io._reader import Entry, Reader, box_into


class Checkpoint(Mapping[str, np.ndarray]):
    """An opened checkpoint; made by :func:`transferjax.io.open`. Only headers have been read.

    It is a read-only mapping from names to arrays: ``[name]`` reads one, ``values()`` and ``items()`` read them one by
    one as they are asked for. Two checkpoints are equal only if they are one object; what they hold is compared by
    :func:`transferjax.io.diff`.

    Attributes:
      path: the absolute path.
      format: ``"torch"``, ``"torch-legacy"``, ``"safetensors"``, ``"npz"``, ``"msgpack"``, ``"keras"`` (an archive),
        ``"keras-weights"`` (``.weights.h5``), ``"keras-legacy"`` (an older ``.h5``), ``"hdf5"`` or ``"orbax"``.
      shapes: ``{path: jax.ShapeDtypeStruct}`` with the file's own names, in natural order as stored.
      metadata: what is no array: the ``metadata`` given to ``save``, a torch file's numbers and strings, the
        ``config`` of a Hugging Face folder (its ``config.json``) or of a Keras file.
      kinds: ``{path: kind}`` of leaves that were no arrays when saved: ``"int"``, ``"float"``, ``"bool"``,
        ``"complex"`` or ``"key:<implementation>"`` (the array is then the key's data).

    >>> import tempfile, numpy as np, transferjax.io as io
    >>> file = tempfile.mkdtemp() + "/w.npz"
    >>> np.savez(file, bias=np.zeros(2))
    >>> checkpoint = io.open(file)
    >>> len(checkpoint), "bias" in checkpoint, checkpoint["bias"], checkpoint.verified
    (1, True, array([0., 0.]), 'verified')
    >>> list(checkpoint.keys()), [(name, array.sum().item()) for name, array in checkpoint.items()]
    (['bias'], [('bias', 0.0)])
    """

    def __init__(self, path: str, reader: Reader):
        self.path, self.format = path, reader.format
        self._reader = reader
        self._manifest = None if reader.manifest is None else Manifest(reader.manifest, f"'{path}'")
        self._digest_matched = False
        self._fingerprint: str | None = None
        self.kinds: Mapping[str, str] = reader.kinds
        self.metadata: Mapping[str, Any] = {**reader.metadata, **reader.beside}
        dtypes = {name: entry.dtype for name, entry in reader.entries.items()}
        if self._manifest is not None:
            self._manifest.check(reader.entries)
            leaves = self._manifest.leaves
            self.metadata = {**self._manifest.metadata, **reader.beside}
            self.kinds = {name: facts["kind"] for name, facts in leaves.items() if "kind" in facts}
            dtypes = {name: dtype_of(leaves[name]["dtype"], f"'{path}'") for name in dtypes}
        self.shapes: Mapping[str, jax.ShapeDtypeStruct] = {
            name: jax.ShapeDtypeStruct(entry.shape, dtypes[name]) for name, entry in reader.entries.items()
        }

    def __getitem__(self, path: str) -> np.ndarray:
        return self.read(path)

    def get(self, path: str, default: Any = None) -> Any:
        """The array of a name, or ``default`` where there is none."""
        return self.read(path) if path in self else default

    def read(self, path: str, index: Any = None) -> np.ndarray:
        """One array, or a part of it; a new array that nothing else refers to.

        A part reads only the bytes it needs; where digests are stored, the blocks of at most 16 MiB that it touches;
        in an archive with checksums, each array's bytes are also checked once, 16 MiB at a time, when first asked for.

        Args:
          path: the name in the file.
          index: integers, slices and ``...``; ``None``: all of it.

        Returns:
          A C-contiguous numpy array.

        Raises:
          CheckpointError: no such name (the nearest ones are printed), an index outside, or damaged bytes.

        >>> import tempfile, numpy as np, transferjax.io as io
        >>> _ = io.save(tempfile.mkdtemp() + "/w.npz", {"w": np.arange(6).reshape(2, 3)}, format="npz")
        >>> io.open(_.metadata["path"]).read("w", (slice(None), 1))
        array([1, 4])
        """
        entry = self._entry(path)
        low, high, inner = normalise(... if index is None else index, entry.shape, path)
        out = entry.box(low, high) if self._manifest is None else self._manifest.read(path, entry, low, high)
        return out if index is None else np.asarray(out[inner], order="C")  # copied only where it is not contiguous

    def read_into(self, path: str, out: np.ndarray, *, once: bool = False) -> None:
        """One array into memory that is there: what reads many large ones spares the system new memory for each.

        Args:
          path: the name in the file.
          out: a C-contiguous numpy array of its shape and dtype. After an error its content is undefined.
          once: whether it is not read again soon: then the system's file cache keeps only what it had of it before. It
            changes nothing for small arrays, for Orbax, and where the system cannot tell.

        Raises:
          CheckpointError: no such name, ``out`` is no such array, or damaged bytes.

        >>> import tempfile, numpy as np, transferjax.io as io
        >>> file, out = tempfile.mkdtemp() + "/w.npz", np.empty(2)
        >>> np.savez(file, bias=np.ones(2))
        >>> io.open(file).read_into("bias", out)
        >>> out
        array([1., 1.])
        """
        entry, spec = self._entry(path), self.shapes[path]
        fits = isinstance(out, np.ndarray) and out.flags.c_contiguous and out.flags.writeable
        if not fits or (out.shape, out.dtype) != (tuple(spec.shape), spec.dtype):
            raise CheckpointError(
                f"'{path}' cannot be read into {describe(out)}. Expected a writable numpy array in C order: "
                f"np.empty({tuple(spec.shape)}, {spec.dtype.name!r})."
            )
        low = (0,) * out.ndim
        with read_once() if once else contextlib.nullcontext():
            if self._manifest is None:
                box_into(entry, low, out.shape, out)
            else:
                self._manifest.read(path, entry, low, out.shape, out)

    def sliceable(self, path: str) -> bool:
        """Whether a part of an array costs about its share: it is stored in C order and not compressed as one piece."""
        entry: Any = self._entry(path)
        compressed = getattr(getattr(entry, "source", None), "compressed", False)
        strides = getattr(entry, "strides", None)
        return not compressed and strides in (None, c_strides(entry.shape, entry.dtype.itemsize))

    def _entry(self, path: str) -> Entry:
        entry = self._reader.entries.get(path) if isinstance(path, str) else None
        if entry is None:
            raise CheckpointError(
                f"'{self.path}' has no array '{path}' among its {len(self)}.{nearest_hint(str(path), self.shapes)}"
            )
        return entry

    @property
    def verified(self) -> str:
        """``"verified"`` if every byte that is served is covered by a digest or checksum, else ``"unverified"``."""
        covered = self._manifest is not None or self._reader.checked or self._digest_matched
        return "verified" if covered else "unverified"

    def fingerprint(self) -> str:
        """The identity of the content: 64 hexadecimal digits, computed once.

        From the stored digests where there are any (then the same tree has the same fingerprint in every format, and
        nothing is read); otherwise the sha256 of the file, or over the names and contents of the directory's files.
        """
        if self._fingerprint is None:
            self._fingerprint = self._reader.digest() if self._manifest is None else self._manifest.fingerprint()
        return self._fingerprint

    def require(self, digest: str) -> None:
        """Checks the content against a digest from elsewhere.

        Args:
          digest: a fingerprint, or the sha256 of the file.

        Raises:
          CheckpointError: it is another content.
        """
        if not isinstance(digest, str):
            raise CheckpointError(f"digest is {type(digest).__name__}. Expected text of 64 hexadecimal digits.")
        wanted = digest.lower().removeprefix("sha256:")
        if len(wanted) != 64 or any(c not in "0123456789abcdef" for c in wanted):
            raise CheckpointError(f"digest '{digest[:80]}' is no sha256. Expected 64 hexadecimal digits.")
        if wanted != self.fingerprint() and (self._manifest is None or wanted != self._reader.digest()):
            raise CheckpointError(
                f"'{self.path}' is not the expected file: its sha256 is {self._reader.digest()}, expected {wanted}."
            )
        self._digest_matched = True

    def __len__(self) -> int:
        return len(self.shapes)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __contains__(self, path: object) -> bool:
        return isinstance(path, str) and path in self.shapes

    def __eq__(self, other: object) -> bool:  # a mapping's own would read every array of both
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"Checkpoint('{self.path}', {self.format}, {len(self)} arrays, {self.verified})"
