"""Folders of images, one sub-folder per class, as a Source."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from pathlib import Path

import numpy as np

from transferjax._errors import DataError, listing
from transferjax.data._image import decode, header_shape
from transferjax.data._source import DAMAGE, Example, Source, corrupt, whole
from transferjax.data._splits import select

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing")


@dataclasses.dataclass(frozen=True, eq=False)
class FolderRecords:
    """Image files, their labels, and their positions in alphabetical order as ids."""

    root: Path
    files: tuple[str, ...]
    all_labels: np.ndarray
    all_ids: np.ndarray
    channels: int

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        try:
            image = decode(self.root / self.files[index], self.channels, orient=True)
        except DAMAGE as cause:
            raise corrupt(index, self.where(index), cause) from cause
        return {"image": image, "label": int(self.all_labels[index]), "id": int(self.all_ids[index])}

    def labels(self, indices: np.ndarray) -> np.ndarray:
        return self.all_labels[indices]

    def ids(self, indices: np.ndarray) -> np.ndarray:
        return self.all_ids[indices]

    def where(self, index: int) -> str:
        return f"{self.root / self.files[index]} (id {self.all_ids[index]})"

    def shape(self) -> tuple[int, ...] | None:
        return self._shape

    @functools.cached_property
    def _shape(self) -> tuple[int, ...] | None:
        found = set()
        for file in self.files:
            try:
                found.add(header_shape(self.root / file))
            except DAMAGE:
                continue
            if len(found) > 1:
                return None
        return (*found.pop(), self.channels) if found else None

    def fingerprint(self) -> str:
        digest = hashlib.sha256(str(self.channels).encode())
        for file, label in zip(self.files, self.all_labels):
            digest.update(f"{file}\0{label}\0{_size(self.root / file)}\n".encode())
        return digest.hexdigest()


def image_folder(path: str | os.PathLike, split: str = "train", *, channels: int = 3) -> Source:
    """A folder of images as a Source: ``PATH/<class>/...`` or ``PATH/<split>/<class>/...``.

    Class names are the sorted names of the class folders (of all splits together); images may lie deeper below them.
    Files with other endings than those of images are passed over. Within a split the order is mixed (by a hash of the
    file's path), so that ``train[:80%]`` is a fair sample of every class; it changes only with the files' names.

    Args:
      path: the folder.
      split: the name of a split folder; a folder without split folders is one split, ``train``. Slices are as in TFDS.
      channels: 3 (RGB) or 1 (grey); images are converted.

    Returns:
      A Source whose ``id`` is the file's position among all files of ``path`` in alphabetical order.

    Raises:
      DataError: no such folder, a folder or class folder without images, or an unknown split.

    >>> import tempfile
    >>> from PIL import Image
    >>> root = Path(tempfile.mkdtemp())
    >>> for name in ("cat", "dog"):
    ...     (root / name).mkdir()
    ...     Image.new("RGB", (6, 4)).save(root / name / "1.png")
    >>> source = image_folder(root)
    >>> source.class_names, source[0]["image"].shape
    (('cat', 'dog'), (4, 6, 3))
    """
    root = Path(path)
    name = f"folder {root}"
    if not root.is_dir():
        raise DataError(f"there is no folder {root}. Expected a folder with one sub-folder of images per class.")
    if channels not in (1, 3):
        raise DataError(f"channels is {channels}; expected 3 (RGB) or 1 (grey).")
    splits = _split_folders(root) or {"train": root}
    listed = {key: _images_by_class(folder) for key, folder in splits.items()}
    _check_listing(root, listed)
    classes = sorted({c for by_class in listed.values() for c in by_class})
    rows = {
        key: sorted(
            ((file.relative_to(root).as_posix(), classes.index(c)) for c, files in by_class.items() for file in files),
            key=lambda row: hashlib.sha256(row[0].encode()).digest(),
        )
        for key, by_class in listed.items()
    }
    records = _records(root, [row for part in rows.values() for row in part], channels)
    source = whole(records, classes, name)
    return source.subset(select(split, {key: len(part) for key, part in rows.items()}, name))


def _records(root: Path, rows: list[tuple[str, int]], channels: int) -> FolderRecords:
    files = [file for file, _ in rows]
    position = {file: number for number, file in enumerate(sorted(files))}
    ids = np.array([position[file] for file in files], np.int64)
    return FolderRecords(root, tuple(files), np.array([label for _, label in rows], np.int32), ids, channels)


def _split_folders(root: Path) -> dict[str, Path]:
    """Sub-folders that bear a split's name and hold folders themselves."""
    named = [f for f in _folders(root) if f.name.lower() in SPLITS and _folders(f)]
    return {f.name: f for f in sorted(named, key=lambda f: (SPLITS.index(f.name.lower()), f.name))}


def _images_by_class(folder: Path) -> dict[str, list[Path]]:
    return {
        f.name: [p for p in f.rglob("*") if p.suffix.lower() in EXTENSIONS and not p.name.startswith(".")]
        for f in _folders(folder)
    }


def _check_listing(root: Path, listed: dict[str, dict[str, list[Path]]]) -> None:
    parts = list(listed.values())
    if not any(files for by_class in parts for files in by_class.values()):
        loose = [p.name for p in root.iterdir() if p.suffix.lower() in EXTENSIONS]
        seen = f" It holds {len(loose):,} images itself, outside of class folders." if loose else ""
        raise DataError(f"folder {root} holds no images in class sub-folders ({', '.join(EXTENSIONS)}).{seen}")
    empty = sorted(c for c in {c for part in parts for c in part} if not any(part.get(c) for part in parts))
    if empty:
        raise DataError(f"folder {root}: no image in the class folders {listing(empty)}. Remove them or fill them.")


def _folders(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith((".", "__")))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
