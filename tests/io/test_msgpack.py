"""Msgpack against Flax and the msgpack package, and every way in which a file can lie."""

import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import pytest
from flax import serialization
from flax import struct as struct_of_flax
from hypothesis import given
from hypothesis import strategies as st

from transferjax._errors import CheckpointError
from transferjax.io import _msgpack, load, open, save
from transferjax.io._bytes import MemoryBytes
from transferjax.io._msgpack_stream import Cursor, pack

DTYPES = ["bool", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "c8", "c16"]
DTYPES += ["bfloat16", "float8_e4m3fn", "float8_e5m2", "int4"]
TREE = {
    "params": {"Dense_0": {"kernel": np.arange(12.0, dtype=np.float32).reshape(3, 4), "bias": np.ones(4, np.float16)}},
    "step": 3, "rate": 0.5, "flag": True, "wave": 1 - 2j, "scale": np.float32(2), "empty": np.zeros((0, 3)),
    "nothing": {}, "note": "text", "none": None, "list": [np.ones(2), {"a": np.zeros(1, np.int8)}],
}  # fmt: skip
NUMBERS = {"step": 3, "rate": 0.5, "flag": True, "wave": 1 - 2j}


def _file(tmp_path, data):
    (tmp_path / "w.msgpack").write_bytes(data)
    return tmp_path / "w.msgpack"


@pytest.mark.parametrize("name", DTYPES)
def test_flax_reads_ours_and_we_read_its(tmp_path, name):
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(getattr(ml_dtypes, name, name))
    save(tmp_path / "ours.msgpack", {"a": {"w": array, "t": array.T}, "s": array[0, 1]})
    theirs = serialization.msgpack_restore((tmp_path / "ours.msgpack").read_bytes())
    assert set(theirs) == {"a", "s"} and set(theirs["a"]) == {"w", "t"}
    assert theirs["a"]["t"].dtype == array.dtype and theirs["a"]["t"].tobytes() == array.T.tobytes()
    checkpoint = open(_file(tmp_path, serialization.msgpack_serialize({"a": {"w": array}, "s": array[0, 1]})))
    assert (checkpoint.format, checkpoint.verified, list(checkpoint)) == ("msgpack", "unverified", ["a/w", "s"])
    assert checkpoint["a/w"].dtype == array.dtype and checkpoint["a/w"].tobytes() == array.tobytes()
    assert checkpoint.read("a/w", np.s_[:, 1]).tobytes() == array[:, 1].tobytes() and checkpoint["s"] == array[0, 1]


def test_everything_that_flax_writes(tmp_path):
    checkpoint = open(_file(tmp_path, serialization.msgpack_serialize(TREE)))
    assert checkpoint.metadata == {"note": "text", "none": None}
    assert checkpoint.kinds == {name: type(value).__name__ for name, value in NUMBERS.items()}
    found = load(checkpoint)
    assert {name: found[name] for name in NUMBERS} == NUMBERS
    assert {type(found[name]) for name in NUMBERS} == {int, float, bool, complex}
    np.testing.assert_array_equal(checkpoint["params/Dense_0/kernel"], TREE["params"]["Dense_0"]["kernel"])
    assert checkpoint["list/1/a"].dtype == np.int8 and checkpoint["empty"].shape == (0, 3)
    assert checkpoint.shapes["scale"].dtype == np.float32 and len(checkpoint) == 10


@struct_of_flax.dataclass
class State:
    params: dict
    step: int


def test_a_dataclass_of_flax_goes_through_ours(tmp_path):
    """They refuse names that they do not know: our digests must not be among the names."""
    state = State({"w": jnp.ones((2, 3)), "b": jnp.arange(3.0)}, 4)
    save(tmp_path / "s.msgpack", serialization.to_state_dict(state))
    back = serialization.from_bytes(state, (tmp_path / "s.msgpack").read_bytes())
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), state.params, back.params)) and back.step == 4
    assert open(tmp_path / "s.msgpack").verified == "verified"


@pytest.mark.parametrize("limit", [8, 40, 1 << 30])
def test_arrays_in_chunks(tmp_path, monkeypatch, limit):
    tree = {"big": np.arange(60.0).reshape(3, 4, 5), "last": np.arange(7, dtype=np.int16), "one": np.array(2.5)}
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", limit)
    monkeypatch.setattr(_msgpack, "_CHUNK", limit)
    save(tmp_path / "ours.msgpack", tree)
    for path in (_file(tmp_path, serialization.msgpack_serialize(tree)), tmp_path / "ours.msgpack"):
        checkpoint = open(path)
        for name, array in tree.items():
            assert checkpoint[name].dtype == array.dtype and np.array_equal(checkpoint[name], array)
        np.testing.assert_array_equal(checkpoint.read("big", np.s_[1:, ::2, 3]), tree["big"][1:, ::2, 3])
    theirs = serialization.msgpack_restore((tmp_path / "ours.msgpack").read_bytes())
    assert theirs.keys() == tree.keys() and all(np.array_equal(theirs[n], tree[n]) for n in tree)
    assert theirs["one"].shape == ()


def test_a_gigabyte_is_opened_by_its_headers_alone(tmp_path, monkeypatch):
    from transferjax.io import _bytes

    size = 1 << 30
    facts = b"\x93" + pack([size]) + pack("int8") + b"\xc6" + struct.pack(">I", size)
    with (tmp_path / "w.msgpack").open("wb") as file:
        file.write(b"\x81" + pack("a") + b"\xc9" + struct.pack(">Ib", size + len(facts), 1) + facts)
        file.truncate(file.tell() + size)  # sparse: no disk is used
    count, original = [], _bytes.FileBytes.read_into

    def counting(self, offset, out):
        count.append(len(out))
        original(self, offset, out)

    monkeypatch.setattr(_bytes.FileBytes, "read_into", counting)
    checkpoint = open(tmp_path / "w.msgpack")
    assert checkpoint.shapes["a"].shape == (size,) and sum(count) < 1 << 18
    assert checkpoint.read("a", slice(size - 3, None)).tolist() == [0, 0, 0] and sum(count) < 1 << 18


values = st.recursive(
    st.one_of(st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False), st.text(), st.none()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text("abc é", min_size=1), inner)),
)


@given(values)
def test_the_cursor_reads_what_the_package_packs(value):
    cursor = Cursor(MemoryBytes(msgpack.packb(value), "here"))
    assert cursor.value() == value and cursor.position == len(msgpack.packb(value))


@given(st.recursive(st.one_of(st.integers(0, 2**64 - 1), st.text()), st.lists))
def test_the_package_reads_what_we_pack(value):
    assert msgpack.unpackb(pack(value)) == value


def test_wide_values():
    for value in ("x" * 70000, list(range(70000)), {str(n): n for n in range(70000)}, "y" * 300, [1] * 300, 1.5):
        assert Cursor(MemoryBytes(msgpack.packb(value), "here")).value() == value
    assert Cursor(MemoryBytes(msgpack.packb(1.5, use_single_float=True), "here")).value() == 1.5
    assert pack("x" * 70000)[:5] == msgpack.packb("x" * 70000)[:5] and pack(True) == msgpack.packb(True)


def _array(shape=(2,), name="float32", data=bytes(8), code=1, tail=b""):
    return msgpack.ExtType(code, msgpack.packb((shape, name, data)) + tail)


def _parts(**changes):
    return {"__msgpack_chunked_array__": True, "shape": {"0": 4}, "chunks": {"0": _array(), "1": _array()}, **changes}


GOOD = {"a": _array()}
NAMED = {"b": _array()}
NO_ARRAY = "'b' is no array: expected its shape, dtype and bytes"
NO_CHUNKS = "'b' is no array in chunks: expected its shape and chunks"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1], "it holds no mapping of names"),
        ({"a": "text"}, "holds no arrays"),
        ({"a": {}, 2.5: 1}, "a name before byte .* is no text"),
        ({"a\n": 1}, "a name before byte .* is no text"),
        ({"a/b": 1, "a": {"b": 2}}, "two values are called 'a/b'"),
        ({"b": b"bytes"}, "'b' is raw bytes, which Flax does not write"),
        ({"b": msgpack.ExtType(7, b"x")}, "'b' is an extension of type 7, which Flax does not write"),
        ({"b": 1 << 63}, "'b' is an integer beyond 63 bits"),
        ({"b": msgpack.ExtType(2, msgpack.packb([1.0]))}, "'b' is no complex number"),
        ({"b": msgpack.ExtType(2, msgpack.packb(["a", "b"]))}, "'b' is no complex number"),
        ({"b": _array(code=3)}, "'b' is a single number with a shape"),
        ({"b": _array(tail=b"\0")}, NO_ARRAY),
        ({"b": msgpack.ExtType(1, msgpack.packb([1, 2]))}, NO_ARRAY),
        ({"b": _array(shape=(-2,))}, NO_ARRAY),
        ({"b": _array(shape=(1 << 62,))}, NO_ARRAY),
        ({"b": _array(shape=2)}, NO_ARRAY),
        ({"b": _array(data="x" * 8)}, NO_ARRAY),
        ({"b": _array(name=3)}, NO_ARRAY),
        ({"b": _array(name="float31")}, "names the dtype 'float31', which is not known here"),
        ({"b": _array(name="object")}, "'b' holds object. Expected numbers"),
        ({"b": _array(name="float128", shape=(1,), data=bytes(16))}, "'b' holds float128. Expected numbers"),
        ({"b": _array(name="i4,f4", shape=(1,))}, "'b' holds i4,f4. Expected numbers"),
        ({"b": _array(shape=(3,))}, r"'b' is \(3,\) float32, but 8 bytes are stored"),
        ({"b": _parts(shape={"0": 5})}, r"the chunks of 'b' do not make up \(5,\) float32"),
        ({"b": _parts(chunks={"0": _array(), "1": _array(name="int32")})}, "the chunks of 'b' do not make up"),
        ({"b": _parts(chunks={"0": _array(shape=(1, 2)), "1": _array()})}, "the chunks of 'b' do not make up"),
        ({"b": _parts(chunks={"0": _array(), "2": _array()})}, NO_CHUNKS),
        ({"b": _parts(chunks={})}, NO_CHUNKS),
        ({"b": _parts(shape={"1": 4})}, NO_CHUNKS),
        ({"b": _parts(more=1)}, NO_CHUNKS),
        ({"b": _parts(chunks={"0": 1.5})}, "a chunk of 'b' is no array"),
        ({"b": _parts(transferjax=1)}, NO_CHUNKS),
        ({"a": _parts(transferjax="{}"), "b": _parts(transferjax="{}")}, "'b' is the second to carry digests"),
        (
            {"b": {"chunks": {"0": _array()}, "transferjax": "{}"}},
            "the digests at 'b/transferjax' stand beside no array",
        ),
        ({"b": _parts(transferjax="{}")}, "the manifest of .* does not match its own digest"),
    ],
)
def test_values_that_lie(tmp_path, value, message):
    with pytest.raises(CheckpointError, match=message):
        open(_file(tmp_path, msgpack.packb(value)))


def _deep(depth):
    return b"\x81\xa1a" * depth + b"\xc0"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (msgpack.packb(GOOD) + b"\0", "1 bytes follow its end"),
        (msgpack.packb(GOOD)[:-1], "is truncated or damaged: expected 21 bytes at position"),
        (b"\x82\xa1a\x01\xa1a\x02", "'a' comes twice in one mapping"),
        (b"\x81\xa1a\xc1", "byte 3 begins no value"),
        (b"\x81\xa1\xff\x01", "the text before byte 3 is no UTF-8"),
        (b"\x81\xa1a\xdd\xff\xff\xff\xff", "a list at byte 8 claims 4294967295 values"),
        (b"\xdf\xff\xff\xff\xff\xa1a", "a mapping at byte 5 claims 4294967295 values"),
        (b"\x81\xdb\xff\xff\xff\xff", "a text of 4294967295 bytes"),
        (b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", "expected 4294967295 bytes"),
        (b"\x81\xa1a", "expected 1 bytes at position 3"),
        (_deep(5000), "or they are nested too deeply"),
        (b"\x81\xa1a" + b"\x91" * 5000, "or they are nested too deeply"),
    ],
)
def test_bytes_that_lie(tmp_path, data, message):
    with pytest.raises(CheckpointError, match=message):
        open(_file(tmp_path, data))


def test_too_many_values(tmp_path, monkeypatch):
    monkeypatch.setattr("transferjax.io._msgpack_stream._MOST", 100)
    with pytest.raises(CheckpointError, match="it has too many values"):
        open(_file(tmp_path, msgpack.packb({"a": [0] * 200})))


def test_the_content_is_known_whatever_the_name(tmp_path):
    for number, tree in enumerate([{"params": np.ones(2)}, {f"{n:03d}": np.ones(1) for n in range(300)}]):
        (tmp_path / f"{number}.bin").write_bytes(serialization.msgpack_serialize(tree))
        assert open(tmp_path / f"{number}.bin").format == "msgpack"
