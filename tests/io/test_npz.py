"""npz: against numpy, and every way a member can lie."""

import io
import pathlib
import zipfile

import ml_dtypes
import numpy as np
import pytest

from transferjax._errors import CheckpointError
from transferjax.io import open, save
from transferjax.io._npz import KEY

DTYPES = ["bool", *["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "c8", "c16"]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_reads_ours_and_we_read_its(tmp_path, dtype):
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype)
    save(tmp_path / "ours.npz", {"a": {"w": array, "t": array.T}, "s": array[0, 0]}, format="npz")
    with np.load(tmp_path / "ours.npz") as theirs:
        assert set(theirs.files) == {"a/w", "a/t", "s", KEY}
        assert theirs["a/t"].dtype == dtype and np.array_equal(theirs["a/t"], array.T)
    for write in (np.savez, np.savez_compressed):
        write(tmp_path / "theirs.npz", w=array, f=np.asfortranarray(array), s=array[0, 1], e=array[:0])
        checkpoint = open(tmp_path / "theirs.npz")
        assert (checkpoint.format, checkpoint.verified, checkpoint.metadata) == ("npz", "verified", {})
        for name in ("w", "f"):
            assert checkpoint[name].dtype == dtype and np.array_equal(checkpoint[name], array)
            assert checkpoint[name].flags.c_contiguous
            np.testing.assert_array_equal(checkpoint.read(name, (slice(None), 1)), array[:, 1])
        assert checkpoint["s"] == array[0, 1] and checkpoint["e"].shape == (0, 3)


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "float4_e2m1fn"])
def test_dtypes_that_numpy_does_not_know_keep_their_bits(tmp_path, name):
    array = np.arange(6).reshape(2, 3).astype(getattr(ml_dtypes, name))
    save(tmp_path / "w.npz", {"w": array}, format="npz")
    assert open(tmp_path / "w.npz").shapes["w"].dtype == array.dtype
    assert open(tmp_path / "w.npz")["w"].tobytes() == array.tobytes()
    with np.load(tmp_path / "w.npz") as theirs:
        assert theirs["w"].dtype == f"u{array.dtype.itemsize}" and theirs["w"].tobytes() == array.tobytes()


def test_big_vision_stores_bfloat16_as_raw_bytes(tmp_path):
    """Names with slashes, and what numpy writes of a dtype that it does not know: the only one of 2 bytes."""
    kernel = np.arange(-3, 3).reshape(2, 3).astype(ml_dtypes.bfloat16)
    name = "params/Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel"
    np.savez(
        tmp_path / "w.npz", **{name: kernel, "params/head/bias": np.zeros(3, np.float32), "void": kernel.view("V2")}
    )
    checkpoint = open(tmp_path / "w.npz")
    assert set(checkpoint) == {name, "params/head/bias", "void"}
    for found in (checkpoint[name], checkpoint["void"]):
        assert found.dtype == ml_dtypes.bfloat16 and found.tobytes() == kernel.tobytes()
    assert checkpoint.read(name, (1, slice(1, None))).tolist() == [1, 2]


def test_equal_trees_give_equal_files(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / name, {"w": np.arange(3)}, format="npz")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def npy(array=None, header=None, version=1, payload=b"\0" * 8):
    if array is not None:
        out = io.BytesIO()
        np.lib.format.write_array(out, array, version=(version, 0))
        return out.getvalue()
    text = header.encode() + b"\n"
    size = len(text).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + text + payload


def member(tmp_path: pathlib.Path, data, name="w.npy", **options):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", **options) as archive:
        archive.writestr(name, data)
    return tmp_path / "x.npz"


@pytest.mark.parametrize("version", [1, 2, 3])
def test_header_versions(tmp_path, version):
    assert open(member(tmp_path, npy(np.arange(3.0), version=version)))["w"].tolist() == [0, 1, 2]


HEAD = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"


def test_headers_of_other_writers(tmp_path):
    assert open(member(tmp_path, npy(header=HEAD.replace(", }", "}"))))["w"].tolist() == [0, 0]
    assert open(member(tmp_path, npy(header="{'shape': (2L,), 'descr': '<f4', 'fortran_order': False}")))["w"].size == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "does not start like a .npy array"),
        (b"\x93NUMPY\x01\x00\x05", "does not start like a .npy array"),
        (b"\x93NUMPX" + bytes(20), "does not start like a .npy array"),
        (npy(header=HEAD, version=9), "does not start like a .npy array"),
        (b"\x93NUMPY\x01\x00\xff\xff" + bytes(20), "its header claims 65535 bytes"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(20), "its header claims 4294967295 bytes"),
        (npy(header=HEAD.replace("2,", "3,")), r"\(3,\) float32 ends at byte"),
        (npy(header=HEAD.replace("2,", "1,")), "takes .* bytes, but .* are stored"),
        (npy(header=HEAD.replace("2,", "-2,")), "its header cannot be read"),
        (npy(header=HEAD.replace("2,", f"{2**62},")), "list of counts"),
        (npy(header=HEAD.replace("2,", "2, 0, 99999999999999999,")), "is beyond any array"),
        (npy(header=HEAD.replace("descr", "dtype")), "its header cannot be read"),
        (npy(header="__import__('os')"), "its header cannot be read"),
        (npy(header=HEAD.replace("<f4", "<f3")), "its dtype <f3 is no number"),
        (npy(header=HEAD.replace("<f4", ">f4")), "'w' has dtype >f4. Expected little-endian numbers"),
        (npy(header=HEAD.replace("<f4", "|V1")), r"'w' has dtype \|V1.*float8 and int4.*transferjax.io.save"),
        (npy(header=HEAD.replace("<f4", "<f1")), "'w' has dtype <f1.*float8 and int4"),
        (npy(header=HEAD.replace("<f4", "<U2")), "'w' has dtype <U2. Expected numbers"),
        (npy(header=HEAD.replace("'<f4'", "[('a', '<f4')]")), "'w' is a structured array"),
        (npy(header=HEAD.replace("<f4", "|O")), "'w' holds pickled Python objects"),
    ],
)
def test_members_that_lie(tmp_path, data, message):
    with pytest.raises(CheckpointError, match=message):
        open(member(tmp_path, data))


def test_pickled_objects_are_never_read(tmp_path):
    np.savez(tmp_path / "x.npz", w=np.array([print, None], dtype=object))
    with pytest.raises(CheckpointError, match="'w' holds pickled Python objects, which are not read"):
        open(tmp_path / "x.npz")


def test_a_member_that_is_no_array(tmp_path):
    with pytest.raises(CheckpointError, match=r"'note\.txt' in .* is no \.npy array"):
        open(member(tmp_path, b"hello", name="note.txt"))


def test_a_lost_manifest_of_bfloat16_is_noticed(tmp_path):
    save(tmp_path / "w.npz", {"w": np.ones(3, ml_dtypes.bfloat16)}, format="npz")
    data = (tmp_path / "w.npz").read_bytes()
    (tmp_path / "w.npz").write_bytes(data.replace(b"__transferjax__", b"__transferjay__", 1))
    with pytest.raises(CheckpointError, match="header and directory disagree about its name"):
        open(tmp_path / "w.npz")
