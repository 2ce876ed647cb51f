"""save -> open is the identity for every format and dtype it can hold."""

import os
import resource
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from transferjax import Model
from transferjax._errors import CheckpointError
from transferjax.io import load, open, save
from transferjax.merging import leafwise, soup

FORMATS = ["orbax", "safetensors", "npz", "msgpack"]
ALL = [
    "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64",
    "complex64", "bfloat16", "float8_e4m3fn", "float8_e5m2",
]  # fmt: skip
SOME = {
    "complex128": "safetensors",
    "int4": "safetensors",
    "float8_e4m3": "safetensors orbax",
    "uint4": "safetensors orbax",
}


def _array(dtype):
    return np.arange(6).reshape(2, 3).astype(getattr(ml_dtypes, dtype, dtype))


@pytest.mark.parametrize("format", FORMATS)
def test_dtypes_that_every_format_holds(tmp_path, format):
    tree = {dtype: _array(dtype) for dtype in ALL}
    save(tmp_path / "w", tree, format=format)
    checkpoint = open(tmp_path / "w")
    assert checkpoint.format == format and checkpoint.verified == "verified"
    for dtype, array in tree.items():
        assert checkpoint.shapes[dtype].dtype == array.dtype and checkpoint[dtype].dtype == array.dtype
        assert checkpoint[dtype].tobytes() == array.tobytes()
        assert checkpoint.read(dtype, (slice(None), 1)).tobytes() == array[:, 1].tobytes()


@pytest.mark.parametrize("dtype", SOME)
@pytest.mark.parametrize("format", FORMATS)
def test_dtypes_that_some_formats_hold(tmp_path, format, dtype):
    tree = {"a": {"w": _array(dtype)}}
    if format in SOME[dtype]:
        with pytest.raises(
            CheckpointError, match=rf"'a/w' is \(2, 3\) {dtype}, which {format} cannot hold. Save with format='npz'"
        ):
            save(tmp_path / "w", tree, format=format)
        assert not os.listdir(tmp_path)
    else:
        save(tmp_path / "w", tree, format=format)
        assert open(tmp_path / "w")["a/w"].tobytes() == tree["a"]["w"].tobytes()


@pytest.mark.parametrize("format", FORMATS)
def test_everything_that_is_no_plain_array(tmp_path, format):
    tree = {
        "step": 3, "rate": 0.5, "flag": True, "scalar": np.float32(2), "zero": np.zeros((0, 3), np.float32),
        "key": jax.random.key(1), "keys": jax.random.split(jax.random.key(1), 3), "t": np.arange(6.0).reshape(2, 3).T,
        "layers": [jnp.ones(2, jnp.bfloat16), (np.array(5),)], "strided": np.arange(10)[::3],
    }  # fmt: skip
    save(tmp_path / "w", tree, format=format, metadata={"epoch": 3, "names": ["a", None], "note": "é"})
    assert open(tmp_path / "w").metadata == {"epoch": 3, "names": ["a", None], "note": "é"}
    found = load(tmp_path / "w", like=tree)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(tree)):
        assert type(a) is type(b) or isinstance(b, jax.Array) == isinstance(a, jax.Array)
        assert jnp.array_equal(a, b) and getattr(a, "dtype", None) == getattr(b, "dtype", None)


dtypes = st.sampled_from([np.dtype(d) for d in ("f4", "i8", "u1", "?", "f2", "c8")])
arrays = dtypes.flatmap(lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)))
names = st.text(
    st.characters(codec="utf-8", exclude_characters="/\\\0.", exclude_categories=("C",)), min_size=1, max_size=4
)
trees = st.dictionaries(
    names, st.one_of(arrays, st.dictionaries(names, arrays, min_size=1, max_size=2)), min_size=1, max_size=3
)


@pytest.mark.parametrize("format", ["safetensors", "npz", "msgpack"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=trees)
def test_any_tree_comes_back(tmp_path, kit, format, tree):
    names = {k for k in tree}
    if any(n.startswith(("C:", "/")) or n[1:2] == ":" for n in names):
        return
    save(tmp_path / "w", tree, format=format, overwrite=True)
    found = load(tmp_path / "w")
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(tree)):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def test_a_model_saves_params_and_extra(tmp_path):
    model = Model(None, None, {"bn": {"scale": np.ones(2)}}, {"bn": {"mean": np.zeros(2)}})
    save(tmp_path / "w", model, format="npz")
    assert list(open(tmp_path / "w")) == ["bn/mean", "bn/scale"]


def test_the_report(tmp_path, tree):
    report = save(tmp_path / "w.npz", tree, format="npz")
    assert report.columns == ("path", "shape", "dtype", "bytes")
    assert ("stem/kernel", "(3, 5)", "float32", 60) in report.rows
    facts = report.metadata
    assert (facts["path"], facts["format"], facts["leaves"], facts["verified"]) == (
        str(tmp_path / "w.npz"),
        "npz",
        7,
        "verified",
    )
    assert facts["parameters"] == 35 and facts["bytes"] == sum(report.column("bytes"))


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_overwritten_unasked(tmp_path, format):
    save(tmp_path / "w", {"a": np.ones(2)}, format=format)
    with pytest.raises(CheckpointError, match=r"w' exists. Choose another path, or pass overwrite=True"):
        save(tmp_path / "w", {"a": np.zeros(2)}, format=format)
    assert open(tmp_path / "w")["a"].tolist() == [1, 1]
    save(tmp_path / "w", {"a": np.zeros(3)}, format=format, overwrite=True)
    assert open(tmp_path / "w")["a"].tolist() == [0, 0, 0] and os.listdir(tmp_path) == ["w"]


LIMITED = """
import resource, sys, numpy as np
from transferjax import io
from transferjax._errors import CheckpointError
path, format = sys.argv[1:]
io.save(path, {"a": np.ones(2)}, format=format)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # no file may grow beyond 1 MiB: like a full disk
try:
    io.save(path, {"a": np.random.default_rng(0).normal(size=1 << 19)}, format=format, overwrite=True)
except CheckpointError as error:
    assert path in str(error), error
    assert io.open(path)["a"].tolist() == [1, 1]
    print("kept")
"""


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_leaves_the_old_state(tmp_path, format):
    assert resource.RLIMIT_FSIZE is not None
    out = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "w"), format], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "kept", out.stderr[-2000:]
    assert os.listdir(tmp_path) == ["w"]


def test_a_directory_that_refuses(tmp_path, monkeypatch):
    def refuse(path, *rest):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("transferjax.io._beside.os.mkdir", refuse)
    for format in FORMATS:
        with pytest.raises(CheckpointError, match=r"cannot write '.*w': Permission denied"):
            save(tmp_path / "w", {"a": np.ones(2)}, format=format)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "the tree has no leaves, so there is nothing to save"),
        (np.ones(2), "the tree is a single leaf without a name"),
        (leafwise(soup, [{"a": np.ones(2)}]), r"got an opened checkpoint .*transferjax.io.transplant"),
        ({"a": {"b": "text"}}, "'a/b' is str. Expected an array or a number"),
        ({"a/b": 1, "a": {"b": 2}}, "two leaves have the path 'a/b'"),
        ({"..": 1}, "'..' cannot be the name of a leaf in a file. Rename it in the tree"),
        ({"a": {"..": {"b": 1}}}, "'a/../b' cannot be the name"),
        ({"": {"b": 1}}, "'/b' cannot be the name"),
        ({"__transferjax__": 1}, "cannot be the name"),
        ({"__metadata__": 1}, "cannot be the name"),
        ({"a\0": 1}, "cannot be the name"),
        ({"C:a": 1}, "cannot be the name"),
        ({"\ud800": 1}, "cannot be the name"),
    ],
)
@pytest.mark.parametrize("format", FORMATS)
def test_trees_that_cannot_be_saved(tmp_path, format, tree, message):
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path / "w", tree, format=format)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("value", [np.ones(2), float("nan"), {1, 2}, print, b"a"])
def test_metadata_that_json_cannot_hold(tmp_path, value):
    with pytest.raises(CheckpointError, match=r"metadata 'note' is .*, which JSON cannot hold"):
        save(tmp_path / "w", {"a": 1}, metadata={"note": value})


@pytest.mark.parametrize("metadata", ["x", 5, ["note"]])
def test_metadata_that_are_no_dict(tmp_path, metadata):
    with pytest.raises(
        CheckpointError, match=r"metadata is (str|int|list). Expected a dict of facts: {'note': 'text'}"
    ):
        save(tmp_path / "w", {"a": 1}, metadata=metadata)


def test_metadata_under_a_number(tmp_path):
    with pytest.raises(CheckpointError, match="metadata 3 is str, which JSON cannot hold"):
        save(tmp_path / "w", {"a": 1}, metadata={3: "x"})


def test_an_unknown_format(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"format 'pickle' is not written here. Expected one of orbax, safetensors, npz, msgpack"
    ):
        save(tmp_path / "w", {"a": 1}, format="pickle")


def test_text_is_visible_to_other_readers_of_safetensors(tmp_path):
    import safetensors

    save(tmp_path / "w", {"a": np.ones(1)}, format="safetensors", metadata={"format": "pt", "epoch": 3})
    with safetensors.safe_open(tmp_path / "w", "numpy") as file:
        assert file.metadata()["format"] == "pt" and set(file.metadata()) == {"format", "transferjax"}


def test_later_writes_to_the_source_do_not_matter(tmp_path):
    array = np.ones(3)
    save(tmp_path / "w", {"a": array}, format="npz")
    array[:] = 5
    assert open(tmp_path / "w")["a"].tolist() == [1, 1, 1]


def test_nothing_warns(tmp_path, tree):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for format in FORMATS:
            save(tmp_path / format, tree, format=format)
            load(tmp_path / format)


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("w.safetensors", "safetensors"),
        ("w.NPZ", "npz"),
        ("w.npz", "npz"),
        ("w.msgpack", "msgpack"),
        ("w", "orbax"),
        ("w.v2", "orbax"),
        ("step_1.5", "orbax"),
        ("lite0.best", "orbax"),
    ],
)
def test_without_a_format_the_ending_of_the_path_decides(tmp_path, name, format):
    report = save(tmp_path / name, {"a": np.ones(2, np.float32)})
    assert report.metadata["format"] == format == open(tmp_path / name).format


@pytest.mark.parametrize(
    ("name", "format", "write"), [("w.safetensors", "orbax", "safetensors"), ("w.npz", "safetensors", "npz")]
)
def test_an_ending_of_another_format_raises_and_writes_nothing(tmp_path, name, format, write):
    message = rf"w\.{write}' ends with \.{write}, but format='{format}' was asked for. Leave format out"
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path / name, {"a": np.ones(2)}, format=format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["out.h5", "notes.txt", "back.pth", "m5.bin", "w.KERAS", "a.ckpt", "plan.json"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_an_ending_that_is_not_written_raises(tmp_path, name, overwrite):
    (tmp_path / "old.txt").write_text("text")
    message = (
        rf"{name}' ends with \{os.path.splitext(name)[1].lower()}, which is not written here. Expected .safetensors "
        r"\(torch users load it with safetensors.torch.load_file\), .npz, .msgpack, or for an Orbax directory no ending"
    )
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path / name, {"a": np.ones(2)}, overwrite=overwrite)
    assert os.listdir(tmp_path) == ["old.txt"]
    assert save(tmp_path / name, {"a": np.ones(2)}, "orbax").metadata["format"] == open(tmp_path / name).format
