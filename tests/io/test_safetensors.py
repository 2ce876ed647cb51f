"""Safetensors: against the reference package, every dtype, and every way a header can lie."""

import builtins
import errno
import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from transferjax._errors import CheckpointError
from transferjax.io import _safetensors, open, save
from transferjax.io._safetensors import DTYPES, NAMES, parse_json

NUMPY = [d for d in DTYPES.values() if d.kind in "biufc" and not hasattr(ml_dtypes, d.name)]


@pytest.mark.parametrize("dtype", NUMPY, ids=str)
def test_the_package_reads_ours_and_we_read_its(tmp_path, dtype):
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype)
    save(tmp_path / "ours.safetensors", {"a": {"w": array, "t": array.T}, "s": array[0, 0]}, format="safetensors")
    theirs = load_file(tmp_path / "ours.safetensors")
    assert theirs.keys() == {"a/w", "a/t", "s"}
    np.testing.assert_array_equal(theirs["a/t"], array.T)
    save_file({"w": array, "s": np.array(array[0, 1])}, tmp_path / "theirs.safetensors", {"by": "them"})
    checkpoint = open(tmp_path / "theirs.safetensors")
    assert checkpoint["w"].dtype == dtype and np.array_equal(checkpoint["w"], array)
    assert checkpoint["s"].shape == () and checkpoint.metadata == {"by": "them"}
    assert (checkpoint.format, checkpoint.verified) == ("safetensors", "unverified")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_comes_back_bit_for_bit(tmp_path, dtype):
    array = np.frombuffer(np.random.default_rng(0).bytes(6 * dtype.itemsize), dtype).reshape(2, 3)
    array = array if dtype != np.bool_ else array.view(np.uint8) % 2 == 1
    save(tmp_path / "w.safetensors", {"w": array}, format="safetensors")
    checkpoint = open(tmp_path / "w.safetensors")
    assert (checkpoint["w"].dtype, checkpoint["w"].tobytes()) == (dtype, array.tobytes())
    save_file({"w": array.view(f"u{dtype.itemsize}")}, tmp_path / "bits.safetensors")
    data = (tmp_path / "bits.safetensors").read_bytes()
    name = {1: b'"U8"', 2: b'"U16"', 4: b'"U32"', 8: b'"U64"'}[dtype.itemsize]
    text = data[8:].replace(name, f'"{NAMES[dtype]}"'.encode())
    length = int.from_bytes(data[:8], "little") + len(text) - len(data[8:])
    (tmp_path / "foreign.safetensors").write_bytes(struct.pack("<Q", length) + text)
    for part in (np.s_[:, 1], np.s_[1, ::2], np.s_[::-1]):  # a file without our digests is read in place
        found = open(tmp_path / "foreign.safetensors").read("w", part)
        assert (found.dtype, found.tobytes()) == (dtype, array[part].tobytes())


def test_the_package_names_the_dtypes_alike(tmp_path):
    tree = {name: np.zeros(2, dtype) for name, dtype in DTYPES.items()}
    save(tmp_path / "w.safetensors", tree, format="safetensors")
    with safetensors.safe_open(tmp_path / "w.safetensors", "numpy") as file:
        assert {name: file.get_slice(name).get_dtype() for name in file.keys()} == {n: n for n in DTYPES}  # noqa: SIM118
    assert len(NAMES) == len(DTYPES)


def test_elements_are_aligned_whatever_the_names(tmp_path):
    tree = {"a": np.zeros(3, np.int8), "b": np.zeros(3, np.float64), "c": np.zeros(1, np.float16)}
    save(tmp_path / "w.safetensors", tree, format="safetensors", metadata={"note": "x" * 13})
    checkpoint = open(tmp_path / "w.safetensors")
    for name, entry in checkpoint._reader.entries.items():
        assert entry.offset % entry.dtype.itemsize == 0, name


def test_a_gigabyte_is_opened_by_its_header_alone(tmp_path, monkeypatch):
    rows = 1 << 14
    header = {"big": {"dtype": "F32", "shape": [rows, 1 << 14], "data_offsets": [0, rows << 16]}}
    text = json.dumps(header).encode()
    with (tmp_path / "big.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + (rows << 16))  # sparse: no disk is used
    count = _count_bytes(monkeypatch)
    checkpoint = open(tmp_path / "big.safetensors")
    assert checkpoint.shapes["big"].size * 4 == 1 << 30
    assert sum(count) < 1000
    assert checkpoint.read("big", (12345, slice(0, 8))).tolist() == [0] * 8
    assert sum(count) < 2000
    assert checkpoint.read("big", (slice(None, None, 4096), 7)).shape == (4,)
    assert sum(count) < 1 << 27  # rows are jumped over within the box, not read as one


def _count_bytes(monkeypatch):
    from transferjax.io import _bytes

    count, original = [], _bytes.FileBytes.read_into

    def counting(self, offset, out):
        count.append(len(out))
        original(self, offset, out)

    monkeypatch.setattr(_bytes.FileBytes, "read_into", counting)
    return count


GOOD = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def _file(tmp_path, header, data=bytes(8), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return tmp_path / "x.safetensors"


def _with(**facts):
    return {"w": {**GOOD["w"], **facts}}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (_with(dtype="F33"), r"'w' in .* dtype F33 is none of F64, F32"),
        (_with(dtype=3), "dtype 3 is none of"),
        (_with(shape=[-2]), "its shape is no list of counts"),
        (_with(shape=[True]), "its shape is no list of counts"),
        (_with(shape=[2.0]), "its shape is no list of counts"),
        (_with(shape=[2**70]), "its shape is no list of counts"),
        (_with(shape="2"), "its shape is no list of counts"),
        (_with(shape=[3]), r"\(3,\) float32 takes 12 bytes, but 8 are stored"),
        (_with(shape=[2**40, 2**40]), "takes .* bytes, but 8 are stored"),
        (_with(data_offsets=[0]), "its data_offsets are no two counts"),
        (_with(data_offsets=[-8, 0]), "its data_offsets are no two counts"),
        (_with(data_offsets=[4, 12]), "is damaged or truncated"),
        (_with(data_offsets=[8, 0]), "-8 are stored"),
        (_with(extra=1), "expected dtype, shape and data_offsets"),
        ({"w": [1]}, "expected dtype, shape and data_offsets"),
        ({**GOOD, "v": GOOD["w"]}, "'w' starts at byte 0 of the data; the one before ends at 8"),
        ({**GOOD, "__metadata__": {"a": 1}}, "__metadata__ is no mapping from text to text"),
        ({**GOOD, "__metadata__": "a"}, "__metadata__ is no mapping from text to text"),
        ({}, "its arrays take 0 bytes, it holds 8"),
        (b"[1]     ", "is no JSON object|no safetensors|dtype"),
        (b'{"a": 1', "it is no JSON"),
        (b'{"a": 1, "a": 2}', "names 'a' twice"),
        (b"{" + b'"a":{' * 20000, "it is no JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "it is no JSON"),
        (b'{"a": "\xff"}', "it is no JSON"),
    ],
)
def test_headers_that_lie(tmp_path, header, message):
    with pytest.raises(CheckpointError, match=message):
        open(_file(tmp_path, header, bytes(8)))


@pytest.mark.parametrize("length", [2**63, 2**40, 10_000])
def test_a_header_longer_than_the_file(tmp_path, length):
    with pytest.raises(CheckpointError, match=f"no safetensors file: its header claims {length} bytes of"):
        open(_file(tmp_path, GOOD, length=length))


def test_a_gap_and_surplus_bytes(tmp_path):
    with pytest.raises(CheckpointError, match="its arrays take 8 bytes, it holds 12"):
        open(_file(tmp_path, GOOD, bytes(12)))
    with pytest.raises(CheckpointError, match="'w' starts at byte 4 of the data; the one before ends at 0"):
        open(_file(tmp_path, _with(data_offsets=[4, 12]), bytes(12)))


def test_arrays_without_elements(tmp_path):
    header = {"e": {"dtype": "F32", "shape": [0, 3], "data_offsets": [8, 8]}, **GOOD}
    checkpoint = open(_file(tmp_path, header))
    assert checkpoint["e"].shape == (0, 3) and checkpoint.read("e", (..., 1)).shape == (0,)


def test_parse_json_names_what_is_twice():
    with pytest.raises(CheckpointError, match=r"here names 'b' twice. Expected each name once"):
        parse_json(b'{"a": {"b": 1, "b": 2}}', "here")


def test_a_header_whose_length_looks_like_a_pickle(tmp_path):
    text = json.dumps(GOOD).encode().ljust(0x280)
    assert open(_file(tmp_path, text))["w"].tolist() == [0, 0]
    assert (tmp_path / "x.safetensors").read_bytes()[:2] == b"\x80\x02"


def test_what_is_written_goes_to_the_disk_on_the_way(tmp_path, monkeypatch):
    held = []
    monkeypatch.setattr(_safetensors, "_LOOSE", 1000)
    monkeypatch.setattr(_safetensors.os, "fsync", lambda number: held.append(os.fstat(number).st_size))
    arrays = {name: np.full(100, 1, np.float32) for name in "abcdefg"}
    with builtins.open(tmp_path / "w", "wb") as file:
        _safetensors.write_safetensors(file, {n: lambda n=n: arrays[n] for n in arrays}, arrays, dict)
    start = os.path.getsize(tmp_path / "w") - 7 * 400
    assert held == [start + 3 * 400, start + 6 * 400], "once a thousand bytes are there, and no more often"
    assert sorted(load_file(tmp_path / "w")) == sorted(arrays)


def test_a_disk_that_refuses_on_the_way_is_named_and_nothing_is_left(tmp_path, monkeypatch):
    def refuses(number):
        if os.fstat(number).st_size < 3 * 4000:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(_safetensors, "_LOOSE", 1000)
    monkeypatch.setattr(_safetensors.os, "fsync", refuses)
    with pytest.raises(
        CheckpointError, match=r"cannot write '.*w.safetensors': Input/output error. What was there before"
    ):
        save(tmp_path / "w.safetensors", {name: np.ones(1000, np.float32) for name in "abc"})
    assert os.listdir(tmp_path) == []
