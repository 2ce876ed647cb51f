"""HDF5 against h5py, and every way in which a file can lie; the HDF5 library itself hangs on some of these."""

import io
import struct

import h5py
import numpy as np
import pytest

from transferjax._errors import CheckpointError
from transferjax.io import _hdf5, _hdf5_chunks, open
from transferjax.io._bytes import MemoryBytes
from transferjax.io._hdf5 import read_tree

DTYPES = ["bool", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "c8", "c16"]


def _written(write, **options):
    """The bytes of what ``write`` puts into an ``h5py.File``."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", **options) as file:
        write(file)
    return buffer.getvalue()


def _tree(data):
    return read_tree(MemoryBytes(data, "here"))


def _read(data):
    return {name: e.box((0,) * len(e.shape), e.shape) for name, e in _tree(data).entries.items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_h5py(tmp_path, dtype):
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype)
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file["a/whole"] = array
        file["scalar"] = array[0, 1]
        file["empty"] = array[:0]
        file.create_dataset("packed", data=array, chunks=(2, 2), compression="gzip", shuffle=True)
    checkpoint = open(tmp_path / "w.h5")
    assert set(checkpoint) == {"a/whole", "scalar", "empty", "packed"} and checkpoint.format == "hdf5"
    assert checkpoint.verified == "unverified" and len(checkpoint.fingerprint()) == 64
    for name in ("a/whole", "packed"):
        assert checkpoint[name].dtype == dtype and np.array_equal(checkpoint[name], array)
        np.testing.assert_array_equal(checkpoint.read(name, np.s_[::-1, 1]), array[::-1, 1])
    assert checkpoint["scalar"] == array[0, 1] and checkpoint["empty"].shape == (0, 3)


def test_many_names_attributes_and_chunks():
    rng = np.random.default_rng(0)
    large = rng.normal(size=(70, 55))

    def write(file):
        for number in range(300):  # a tree of names with more than one level
            file[f"a/{number}/b"] = np.arange(number % 5 + 1)
        file.create_dataset("chunks", data=large, chunks=(3, 7))
        file["a"].attrs.update({"text": "é", "texts": ["u", "vw"], "fixed": np.array([b"abc"] * 90), "count": 3})

    data = _written(write)
    found, theirs = _read(data), h5py.File(io.BytesIO(data))
    assert len(found) == 301 and np.array_equal(found["chunks"], large)
    assert all(np.array_equal(array, theirs[name][()]) for name, array in found.items())
    facts = _tree(data).attributes["a"]
    assert (facts["text"], facts["texts"], facts["fixed"], facts["count"]) == ("é", ["u", "vw"], ["abc"] * 90, 3)
    part = _tree(data).entries["chunks"].box((2, 6), (11, 30))
    np.testing.assert_array_equal(part, large[2:11, 6:30])


def test_a_dataset_under_two_names_and_a_compact_one():
    def write(file):
        file["a"] = np.arange(3)
        file["b"] = file["a"]
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_layout(h5py.h5d.COMPACT)
        space = h5py.h5s.create_simple((2, 2))
        made = h5py.h5d.create(file.id, b"compact", h5py.h5t.NATIVE_INT16, space, dcpl=plist)
        made.write(h5py.h5s.ALL, h5py.h5s.ALL, np.array([[1, 2], [3, 4]], np.int16))

    found = _read(_written(write))
    assert found["a"].tolist() == found["b"].tolist() == [0, 1, 2] and found["compact"].tolist() == [[1, 2], [3, 4]]


def _virtual(file):
    layout = h5py.VirtualLayout((3,), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "a", shape=(3,))
    file.create_virtual_dataset("a", layout)


def _circle(file):
    file["g/a"] = np.ones(2)
    file["g/again"] = file["/"]


def _many(file):
    for number in range(20):
        file.create_group("g", track_order=True) if not number else None
        file[f"g/{number}"] = number


REFUSED = {
    "a soft link": (lambda f: f.update({"a": h5py.SoftLink("/b")}), r"'/a' is a link, which is not followed"),
    "an external link": (lambda f: f.update({"a": h5py.ExternalLink("/etc/passwd", "b")}), "of a newer kind"),
    "a circle": (_circle, r"the group 'g/again' is met twice, or lies too deep"),
    "a virtual dataset": (_virtual, "its layout is not known here. Write it again with h5py.File|of a newer kind"),
    "another file": (
        lambda f: f.create_dataset("a", (3,), "f4", external=[("/etc/passwd", 0, 12)]),
        "'a': it is stored in another file, which is not read",
    ),
    "texts": (lambda f: f.create_dataset("a", data=["x"]), "'a': it holds no numbers. Expected an array"),
    "records": (lambda f: f.create_dataset("a", data=np.zeros(2, "i4,f4")), "'a': it holds no numbers"),
    "big-endian": (lambda f: f.create_dataset("a", data=np.ones(2, ">f4")), "'a': it holds big-endian numbers"),
    "raw bytes": (lambda f: f.create_dataset("a", data=np.zeros(2, "V2")), "'a': it holds no numbers"),
    "nothing": (lambda f: f.create_dataset("a", data=h5py.Empty("f4")), "no elements and no shape"),
    "never written": (lambda f: f.create_dataset("a", (3,), "f4"), r"\(3,\) float32 takes 12 bytes, but 0 are stored"),
    "half written": (
        lambda f: f.create_dataset("a", (9,), "f4", chunks=(3,)).__setitem__(slice(0, 3), 1),
        "'a': 1 of its 3 chunks were written",
    ),
    "another filter": (
        lambda f: f.create_dataset("a", data=np.ones(9), chunks=(3,), fletcher32=True),
        "'a': it is packed by filter 3. Expected gzip and shuffle only",
    ),
    "odd integers": (
        lambda f: h5py.h5d.create(f.id, b"a", _odd(h5py.h5t.NATIVE_INT32), h5py.h5s.create_simple((2,))),
        "'a': it holds integers of 4 bytes that no dtype has",
    ),
    "odd floats": (
        lambda f: h5py.h5d.create(f.id, b"a", _biased(), h5py.h5s.create_simple((2,))),
        "'a': it holds floats of 4 bytes that no dtype has",
    ),
    "a committed type": (
        lambda f: f.update({"t": np.dtype("f4")}),
        "'t': it is neither a group nor a dataset that is known here",
    ),
    "ordered groups": (_many, "has a header of a newer kind|of a newer kind"),
    "a strange name": (lambda f: f.update({"a\\b": 1}), "holds b'a.*b', which cannot be a name"),
}


def _odd(kind):
    kind = kind.copy()
    kind.set_precision(24)
    return kind


def _biased():
    kind = h5py.h5t.NATIVE_FLOAT.copy()
    kind.set_ebias(126)
    return kind


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what):
    write, message = REFUSED[what]
    with pytest.raises(CheckpointError, match=message):
        _read(_written(write))


def test_newer_files_are_refused_by_name():
    data = _written(lambda f: f.update({"a": 1}), libver="latest")
    with pytest.raises(CheckpointError, match=r"it begins with version \d. Expected 0 or 1. Write it again with h5py"):
        _tree(data)


def test_a_user_block_and_surplus_bytes():
    data = _written(lambda f: f.update({"a": 1}))
    with pytest.raises(CheckpointError, match=r"it is truncated: it says that it has 1408 bytes, but has 1409"):
        _tree(data + b"\0")
    with pytest.raises(CheckpointError, match=r"it begins at byte 512\. Expected no user block"):
        _tree(data[:24] + struct.pack("<Q", 512) + data[32:])


def _plain(file):
    file["group/a"] = np.arange(6.0)
    file["group/b"] = np.arange(4, dtype=np.int32)
    file["group"].attrs["text"] = "hello"
    file.create_dataset("z", data=np.arange(12.0), chunks=(4,), compression="gzip")


def _patched(data, mark, offset, patch, which=0):
    at = -1
    for _ in range(which + 1):
        at = data.index(mark, at + 1)
    return data[: at + offset] + patch + data[at + offset + len(patch) :]


HUGE = struct.pack("<Q", 1 << 62)
PATCHES = {
    "a heap of names elsewhere": (b"HEAP", 0, b"HEAQ", 0, "the names in '' are not where they should be"),
    "a huge heap of names": (b"HEAP", 8, HUGE, 0, "the names in '' are not where they should be"),
    "a name list that is none": (b"SNOD", 0, b"SNOE", 0, "the list of names of '' cannot be read at byte"),
    "texts elsewhere": (b"GCOL", 0, b"GCOM", 0, "there are no texts at byte"),
    "a text that is cut off": (b"GCOL", 24, HUGE, 0, "the texts at byte .* are cut off"),
    "another text": (b"GCOL", 16, b"\x09", 0, "there is no text 1 at byte"),
    "a text that is none": (b"hello", 0, b"\xff", 0, "attribute 'text': its text is no UTF-8"),
    "a name twice": (b"a\0\0\0\0\0\0\0b\0", 8, b"a", 0, "the names in 'group' are not in order, or one comes twice"),
    "a name with a slash": (b"group\0", 0, b"gr/up", 0, "holds b'gr/up', which cannot be a name"),
}


@pytest.mark.parametrize("what", PATCHES)
def test_structures_that_lie(what):
    data = _written(_plain)
    mark, offset, patch, which, message = PATCHES[what]
    with pytest.raises(CheckpointError, match=message):
        _read(_patched(data, mark, offset, patch, which))


def _chunk_list(data):
    """Where the list of chunks begins: the node of kind 1."""
    return next(at for at in range(len(data)) if data[at : at + 5] == b"TREE\1")


@pytest.mark.parametrize(
    ("offset", "patch", "message"),
    [
        (0, b"TREF", "'z': its list of chunks cannot be read at byte"),
        (5, b"\1", "'z': its chunks are listed in a circle|'z': its list of chunks cannot be read"),
        (24, struct.pack("<I", 1 << 30), "'z': a chunk lies outside, comes twice"),
        (28, b"\1", "'z': a chunk lies outside, comes twice, or was stored in another way"),
        (32, struct.pack("<Q", 3), "'z': a chunk lies outside"),
        (24, struct.pack("<I", 5), "'z' in here is damaged: a chunk has 0 of 32 bytes"),
    ],
)
def test_chunks_that_lie(offset, patch, message):
    data = _written(_plain)
    at = _chunk_list(data) + offset
    with pytest.raises(CheckpointError, match=message):
        _read(data[:at] + patch + data[at + len(patch) :])


def _message(data, kind, layout):
    """The position of the data of a message of a dataset's header that begins with some bytes."""
    at = -1
    while True:
        at = data.index(layout, at + 1)
        if data[at - 8 : at - 6] == struct.pack("<H", kind):
            return at


@pytest.mark.parametrize(
    ("kind", "start", "offset", "patch", "message"),
    [
        (1, b"\1\1\1\0", 0, b"\5", "its shape cannot be read"),
        (1, b"\1\1\1\0", 1, b"\x09", "its shape is cut off"),
        (1, b"\1\1\1\0", 8, HUGE, "is beyond any array"),
        (1, b"\1\1\1\0", 8, b"\7", r"\(7,\) float64 takes 56 bytes, but 48 are stored"),
        (3, b"\x11\x20\x3f", 0, b"\xf1", "its element type cannot be read"),
        (8, b"\3\1", 0, b"\2", "its layout is not known here. Write it again"),
        (8, b"\3\1", 2, struct.pack("<Q", 1 << 40), "is damaged or truncated"),
        (8, b"\3\1", 2, struct.pack("<Q", 100), "overlaps"),
        (5, b"\2", -8, b"\x08", "its header describes it twice"),
        (8, b"\3\2", 0, b"\3\1", "'z': it is compressed, but not in chunks"),
        (8, b"\3\2", 2, b"\3", "'z': its chunks have other dimensions than it"),
        (8, b"\3\2", 11, struct.pack("<I", 1 << 31), "'z': it claims chunks of"),
        (8, b"\3\2", 11, struct.pack("<I", 0), "'z': it claims chunks of"),
        (0xB, b"\1\1", 0, b"\3", "'z': its filters cannot be read"),
        (0xB, b"\1\1", 1, b"\x09", "'z': its filters cannot be read|it is packed by filter 0"),
        (0xC, b"\1\0", 0, b"\x09", "an attribute cannot be read"),
        (0xC, b"\1\0", 2, b"\xff\xff", "an attribute is cut off"),
    ],
)
def test_messages_that_lie(kind, start, offset, patch, message):
    data = _written(_plain)
    at = _message(data, kind, start) + offset
    with pytest.raises(CheckpointError, match=message):
        _read(data[:at] + patch + data[at + len(patch) :])


def test_two_datasets_in_one_place():
    data = _written(lambda f: f.update({"a": np.arange(6.0), "b": np.arange(6.0)}))
    first = _message(data, 8, b"\3\1") + 2
    second = data.index(b"\3\1", first)
    with pytest.raises(CheckpointError, match="'a' overlaps 'b'"):
        _tree(data[: second + 2] + data[first : first + 8] + data[second + 10 :])


def test_headers_that_lie():
    data = _written(lambda f: f.update({"a": np.arange(6.0)}))
    (root,) = struct.unpack_from("<Q", data, 64)
    patch = lambda at, value: data[: root + at] + value + data[root + at + len(value) :]
    for at, value, message in (
        (0, b"\2", "'' has no header at byte 96"),
        (0, b"OHDR", "'' has a header of a newer kind"),
        (2, b"\x20", "the header of '' lacks .* of its messages"),
        (16, b"\xff", "holds a message that cannot be read"),
        (18, b"\xff\xff", "holds a message that cannot be read"),
        (16, b"\2\0", "'' has links or attributes of a newer kind"),
        (16, b"\x10\0\x10\0\0\0\0\0" + struct.pack("<QQ", root + 16, 24), "the header of '' is continued in a circle"),
    ):
        with pytest.raises(CheckpointError, match=message):
            _tree(patch(at, value))
    with pytest.raises(CheckpointError, match="its addresses do not have 8 bytes"):
        _tree(data[:13] + b"\4" + data[14:])


def test_limits(monkeypatch):
    data = _written(lambda f: [f.update({f"{n}": n}) for n in range(9)])
    monkeypatch.setattr(_hdf5, "_MOST", 5)
    with pytest.raises(CheckpointError, match="it holds more than 5 groups and datasets"):
        _tree(data)
    monkeypatch.setattr(_hdf5_chunks, "_MOST", 2)
    with pytest.raises(CheckpointError, match="it claims 3 chunks"):
        _tree(_written(lambda f: f.create_dataset("a", data=np.ones(9), chunks=(3,))))


def test_a_bomb_is_not_inflated():
    """Chunks that are larger than the file could ever hold."""
    data = _written(lambda f: f.create_dataset("a", data=np.zeros(1 << 22), chunks=(1 << 22,), compression="gzip"))
    assert len(data) < 1 << 16 and _read(data)["a"].shape == (1 << 22,)
    at = _message(data, 1, b"\1\1\1\0") + 8
    with pytest.raises(CheckpointError, match=r"'a': it claims chunks of .* bytes in all; that cannot be"):
        _read(data[:at] + struct.pack("<Q", 1 << 40) + data[at + 8 :])
