"""The pickle machine reads data and nothing else."""

import collections
import pickle

import pytest

from transferjax._errors import CheckpointError
from transferjax.io._pickle import Forbidden, Global, Reader

VALUES = [
    None, True, 0, -5, 255, 70_000, -(2**31), 2**40, -(2**63), 2**200, 1.5, "", "é" * 300, b"ab", b"x" * 300, (), (1,),
    (1, 2, 3, 4), [], [1, [2, (3,)]], {}, {"a": {"b": [None]}, 1: 2, 2.5: 3}, ["same"] * 3,
]  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", VALUES, ids=lambda v: str(v)[:12])
def test_plain_data_equals_python(value, protocol):
    if protocol == 2 and isinstance(value, bytes):
        pytest.skip("protocol 2 writes bytes as a call of a codec")
    assert Reader(pickle.dumps(value, protocol), {}, "here").load() == value


def test_sets_come_as_lists_and_ordered_dicts_as_dicts():
    assert sorted(Reader(pickle.dumps({1, 2}, 4), {}, "here").load()) == [1, 2]
    data = pickle.dumps(collections.OrderedDict(b=1, a=2), 2)
    assert list(Reader(data, {"collections.OrderedDict": dict}, "here").load().items()) == [("b", 1), ("a", 2)]


def test_pickles_one_after_another():
    reader = Reader(pickle.dumps(1, 2) + pickle.dumps("two", 2) + b"rest", {}, "here")
    assert (reader.load(), reader.load(), reader.take(4)) == (1, "two", b"rest")


@pytest.mark.parametrize("value", [print, pickle.Pickler, collections.Counter("a"), ValueError("x")])
def test_names_are_not_imported(value):
    with pytest.raises(
        Forbidden, match=r"here names '[^']+', which is no tensor and no plain data; it was not imported"
    ):
        Reader(pickle.dumps(value, 2), {}, "here").load()


def test_a_global_is_no_function():
    data = b"\x80\x02ca\nb\n)R."
    with pytest.raises(CheckpointError, match="damaged pickle at byte"):
        Reader(data, {"a.b": Global("a.b")}, "here").load()
    assert repr(Reader(b"\x80\x02ca\nb\n.", {"a.b": Global("a.b")}, "here").load()) == "a.b"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "its pickle has no end"),
        (b"\x80\x02]", "its pickle has no end"),
        (b"\x80\x02.", "damaged pickle"),  # an empty stack
        (b"\x80\x02NN.", "damaged pickle"),
        (b"\x80\x02(.", "damaged pickle"),
        (b"\x80\x01N.", "damaged pickle"),
        (b"\x80\x09N.", "damaged pickle"),
        (b"\x80\x02\x8e" + b"\xff" * 8, "needs 18446744073709551615 bytes"),
        (
            b"\x80\x05\x96" + b"\xff" * 8,
            "opcode 0x96 at byte 2, which is not plain data. Expected tensors",
        ),  # BYTEARRAY8 allocates first in CPython
        (b"\x80\x02\x8b" + b"\xff\xff\xff\x7f", "damaged pickle"),  # LONG4 of 2 GiB
        (b"\x80\x02X\x05\0\0\0ab", "needs 5 bytes at position 7, but ends at 9"),
        (b"\x80\x02T\xff\xff\xff\xff", "needs -1 bytes"),
        (b"\x80\x02h\x05.", "damaged pickle"),  # unknown memo
        (b"\x80\x02q\x05.", "damaged pickle"),  # memo of nothing
        (b"\x80\x02(q\x05.", "damaged pickle"),  # memo of a mark
        (b"\x80\x02N(a.", "damaged pickle"),  # append a mark
        (b"\x80\x02NNa.", "damaged pickle"),  # append to None
        (b"\x80\x02}(Nu.", "damaged pickle"),  # odd items
        (b"\x80\x02NNNs.", "damaged pickle"),  # items of None
        (b"\x80\x02}]Ns.", "damaged pickle"),  # a list as key
        (b"\x80\x02})Ns.", "damaged pickle"),  # a tuple as key: hashing may take forever
        (b"\x80\x02NQ.", "damaged pickle"),  # a persistent id where there is none
        (b"\x80\x02NN\x93.", "damaged pickle"),  # a name that is no text
        (b"\x80\x02cos", "a name in its pickle has no end"),
        (b"\x80\x02X\x01\0\0\0\xff.", "damaged pickle"),  # no utf-8
        (b"\x80\x02I1\n.", "opcode 0x49"),
    ],
)
def test_damage(data, message):
    with pytest.raises(CheckpointError, match=message):
        Reader(data, {}, "here").load()


def test_persistent_ids_are_resolved():
    assert Reader(b"\x80\x02K\x07Q.", {}, "here").load(lambda pid: pid + 1) == 8
