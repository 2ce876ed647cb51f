"""transplant: a checkpoint through a plan into another, leaf by leaf."""

import os
import re
import socket
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from transferjax import Model
from transferjax._errors import CheckpointError, PlanError
from transferjax.io import _orbax, _orbax_stream, load, open, save, transplant
from transferjax.surgery import Move, Plan, Spec, cast, fresh, permute, plan, rename, split, stack

RNG = np.random.default_rng(0)
SOURCE = {
    "big": RNG.standard_normal((1100, 5000)).astype(np.float32),  # 21 MiB: two blocks, whole or turned
    "flat": RNG.standard_normal(5_000_000).astype(np.float32),
    "half": RNG.standard_normal((30, 70)).astype(ml_dtypes.bfloat16),
    "qkv": np.arange(12, dtype=np.float32).reshape(6, 2),
    "layers.0": np.ones(3, np.float32),
    "layers.1": np.full(3, 2, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "step": 3,
}
TARGET = {
    "big": np.zeros((5000, 1100), np.float32),
    "flat": np.zeros(5_000_000, np.float32),
    "half": np.zeros((30, 70), np.float32),
    "attention": {name: np.zeros((2, 2), np.float32) for name in ("q", "k", "v")},
    "layers": np.zeros((2, 3), np.float32),
    "empty": SOURCE["empty"],
    "step": np.int64(0),
    "head": {"bias": np.zeros(4, np.float32)},
}
RULES = (
    permute("big", (1, 0)),
    cast("half", "float32"),
    split("qkv", ["attention/q", "attention/k", "attention/v"], axis=0),
    stack(r"layers\.(?P<i>\d+)", "layers"),
    fresh("head/bias"),
)
INIT = {"head/bias": np.full(4, 7, np.float32)}
EXPECTED = {
    "big": SOURCE["big"].T,
    "flat": SOURCE["flat"],
    "half": SOURCE["half"].astype(np.float32),
    "attention/q": SOURCE["qkv"][:2],
    "attention/k": SOURCE["qkv"][2:4],
    "attention/v": SOURCE["qkv"][4:],
    "layers": np.stack([SOURCE["layers.0"], SOURCE["layers.1"]]),
    "empty": SOURCE["empty"],
    "step": np.array(3),
    "head/bias": INIT["head/bias"],
}
FORMATS = ("orbax", "safetensors", "npz", "msgpack")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "w.npz"
    save(path, SOURCE)
    return open(path)


@pytest.fixture(scope="module")
def made(source):
    return plan(source.shapes, TARGET, *RULES)


@pytest.mark.parametrize("format", FORMATS)
def test_every_leaf_is_what_the_plan_says(tmp_path, source, made, format):
    report = transplant(source, made, tmp_path / "w", init=INIT, format=format, metadata={"epoch": 2})
    found = open(tmp_path / "w")
    assert found.format == format and found.verified == "verified" and found.metadata == {"epoch": 2}
    assert set(found) == set(EXPECTED)
    for name, array in EXPECTED.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert found[name].tobytes() == np.ascontiguousarray(array).tobytes(), name
    np.testing.assert_array_equal(found.read("big", np.s_[4990:, ::7]), EXPECTED["big"][4990:, ::7])
    assert load(tmp_path / "w")["step"] == 3 and found.kinds == {"step": "int"}, "a Python number stays one"
    assert report.metadata["fingerprint"] == found.fingerprint() and report.metadata["leaves"] == len(EXPECTED)
    assert ("big", "(5000, 1100)", "float32", 22_000_000, "big", "permute(1, 0)") in report.rows
    assert ("head/bias", "(4,)", "float32", 16, None, "fresh") in report.rows
    assert os.listdir(tmp_path) == ["w"], "nothing is left beside it"


def test_the_same_leaves_have_the_fingerprint_that_save_gives_them(tmp_path, source, made):
    tree = {name: array for name, array in EXPECTED.items() if name != "step"} | {"step": 3}
    saved = save(tmp_path / "saved.npz", tree).metadata["fingerprint"]
    for format in FORMATS:
        found = transplant(source, made, tmp_path / format, init=INIT, format=format)
        assert found.metadata["fingerprint"] == saved


class Foresighted(dict):
    """A checkpoint that notes what it is asked for, and what it was told would come after that."""

    def __init__(self, arrays):
        super().__init__(arrays)
        self.shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}
        self.asked, self.told = [], []

    def sliceable(self, name):
        return False

    def fingerprint(self):
        return "0" * 64

    def read(self, name, index=None):
        self.asked.append(name)
        return self[name] if index is None else self[name][index]

    def ahead(self, name):
        self.told.append((len(self.asked), name))


@pytest.mark.parametrize("format, shard_bytes", [*((format, None) for format in FORMATS), (None, 3000)])
def test_what_comes_next_is_told(tmp_path, format, shard_bytes):
    names = ["b/x", "z", "b/a", "a10", "fresh", "a2"]
    made_of = {name: f"from/{7 * number % 11}" for number, name in enumerate(names)}
    dtypes = {name: np.float16 if name in ("z", "a2") else np.float32 for name in names}
    read = [name for name in names if name != "fresh"]
    arrays = {made_of[name]: np.full((300,), number, dtypes[name]) for number, name in enumerate(read)}
    source = Foresighted(arrays)
    target = {name: jax.ShapeDtypeStruct((300,), dtypes[name]) for name in names}
    rules = [rename(re.escape(made_of[name]), name) for name in read]
    init = lambda name: np.zeros(300, np.float32)
    transplant(source, plan(source.shapes, target, *rules, fresh("fresh")), tmp_path / "w", init=init, format=format,
               shard_bytes=shard_bytes)  # fmt: skip
    assert sorted(source.asked) == sorted(arrays)
    assert source.asked[1:] == [name for _, name in source.told], "in the order in which they are read"
    assert all(number in (place, place + 1) for place, (number, _) in enumerate(source.told)), "one read before"


def test_a_folder_of_safetensors(tmp_path, source, made):
    report = transplant(source, made, tmp_path / "w", init=INIT, shard_bytes=25_000_000, metadata={"note": "x"})
    assert len(list((tmp_path / "w").glob("*.safetensors"))) == 2
    found = open(tmp_path / "w")
    assert found.verified == "verified" and found.fingerprint() == report.metadata["fingerprint"]
    assert all(found[name].tobytes() == np.ascontiguousarray(EXPECTED[name]).tobytes() for name in EXPECTED)
    with pytest.raises(CheckpointError, match="shard_bytes writes a folder of safetensors, but"):
        transplant(source, made, tmp_path / "x", init=INIT, format="npz", shard_bytes=100)


def test_the_ending_says_the_format(tmp_path, source, made):
    for name, format in (("w.safetensors", "safetensors"), ("w.npz", "npz"), ("w", "orbax")):
        assert transplant(source, made, tmp_path / name, init=INIT).metadata["format"] == format
    with pytest.raises(CheckpointError, match=r"ends with \.npz, but format='orbax' was asked for"):
        transplant(source, made, tmp_path / "x.npz", init=INIT, format="orbax")


def test_orbax_loads_it(tmp_path, source, made):
    from orbax.checkpoint import v1 as ocp

    transplant(source, made, tmp_path / "w", init=INIT, metadata={"epoch": 2})
    meta = ocp.metadata(tmp_path / "w")
    assert meta.custom_metadata == {"epoch": 2} and meta.metadata["attention"]["q"].shape == (2, 2)
    whole = ocp.load(tmp_path / "w")
    assert whole["step"] == 3 and "empty" not in whole
    np.testing.assert_array_equal(whole["big"], EXPECTED["big"])
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), np.asarray(a).dtype, sharding=where), whole)
    del like["step"]
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        arrays = ocp.load(tmp_path / "w", like)
    assert isinstance(arrays["layers"], jax.Array) and arrays["layers"].tolist() == [[1, 1, 1], [2, 2, 2]]


def test_tensorstore_itself_notices_damage_to_the_arrays(tmp_path, source, made):
    import tensorstore as ts

    transplant(source, made, tmp_path / "w", init=INIT)
    largest = max((tmp_path / "w").rglob("*"), key=lambda file: file.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    place = {"driver": "ocdbt", "base": f"file://{tmp_path}/w/state/"}
    with pytest.raises(ValueError, match="Digest mismatch"):
        for name in ("flat/", "big/"):
            ts.open({"driver": "zarr3", "kvstore": {**place, "path": name}}, open=True).result().read().result()
    with pytest.raises(CheckpointError, match="damaged"):
        load(tmp_path / "w")


DTYPES = [
    "bool", "int4", "int8", "int16", "int32", "int64", "uint4", "uint8", "uint16", "uint32", "uint64", "bfloat16",
    "float16", "float32", "float64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "float8_e3m4",
    "float8_e4m3fnuz", "float8_e4m3b11fnuz", "float8_e5m2fnuz", "float4_e2m1fn", "float8_e8m0fnu",
]  # fmt: skip


def test_orbax_directories_hold_every_dtype_that_tensorstore_knows(tmp_path):
    names = [name for name in DTYPES if _orbax.holds(np.dtype(getattr(ml_dtypes, name, name)))]
    tree = {name: np.zeros((3, 2)).astype(getattr(ml_dtypes, name, name)) for name in names}
    tree |= {f"{name}_": np.ones((3, 2)).astype(getattr(ml_dtypes, name, name)) for name in names}
    save(tmp_path / "w.npz", tree)
    source = open(tmp_path / "w.npz")
    transplant(source, plan(source.shapes, tree), tmp_path / "w")
    found = open(tmp_path / "w")
    assert all(found[n].dtype == tree[n].dtype and found[n].tobytes() == tree[n].tobytes() for n in tree)
    assert len(names) > 18


def test_many_leaves_in_several_commits(tmp_path):
    tree = {f"layers/{n}": np.full(5, n, np.int32) for n in range(1000)}
    save(tmp_path / "w.npz", tree)
    source = open(tmp_path / "w.npz")
    transplant(source, plan(source.shapes, tree), tmp_path / "w")
    found = open(tmp_path / "w")
    assert all(found[f"layers/{n}"].tolist() == [n] * 5 for n in range(1000))


def test_a_leaf_may_take_several_commits(tmp_path, source, made, monkeypatch):
    monkeypatch.setattr(_orbax_stream, "_BATCH", 1)
    transplant(source, made, tmp_path / "w", init=INIT)
    found = open(tmp_path / "w")
    assert all(found[name].tobytes() == np.ascontiguousarray(EXPECTED[name]).tobytes() for name in EXPECTED)


@pytest.mark.parametrize(
    ("shape", "chunk"),
    [
        ((), ()),
        ((10,), (10,)),
        ((4096, 4096), (1024, 4096)),  # four whole blocks
        ((17 << 10, 256), (2048, 256)),  # a block and a sixteenth: eighths of a block, not two whole ones
        ((30522, 768), (1820, 768)),
        ((3, 5 << 20), (1, 1 << 20)),  # a block is part of a row
        ((2, 3, 4), (2, 3, 4)),
    ],
)
def test_chunks_fill_up_little_and_never_straddle_a_block(shape, chunk):
    from transferjax.io._boxes import block_shape

    found = _orbax_stream.chunk_shape(shape, 4)
    block = block_shape(shape, 4, 1 << 24)
    assert found == chunk or shape == (30522, 768)
    assert all(b % c == 0 for b, c in zip(block, found))
    stored = np.prod([-(-n // c) * c for n, c in zip(shape, found)])
    assert stored <= 1.25 * max(1, np.prod(shape))


@pytest.mark.parametrize("form", ["mapping", "function", "tree", "model"])
def test_forms_of_init(tmp_path, form):
    save(tmp_path / "w.npz", {"a": np.ones(2)})
    source = open(tmp_path / "w.npz")
    target = Model(None, None, {"a": np.zeros(2), "head": {"bias": np.full(3, 5.0)}}, {})
    made = plan(source.shapes, target, fresh("head/**"))
    init = {
        "mapping": {"head/bias": target.params["head"]["bias"]},
        "function": lambda path: {"head/bias": target.params["head"]["bias"]}[path],
        "tree": target.params,
        "model": target,
    }[form]
    transplant(source, made, tmp_path / "out.npz", init=init)
    assert open(tmp_path / "out.npz")["head/bias"].tolist() == [5, 5, 5]


@pytest.mark.parametrize("format", FORMATS)
def test_fresh_keys_and_jax_arrays_are_kept(tmp_path, format):
    save(tmp_path / "w.npz", {"a": np.ones(2, np.float32)})
    source = open(tmp_path / "w.npz")
    target = {"a": jnp.zeros(2), "key": jax.random.key(5), "b": jnp.arange(3, dtype=jnp.bfloat16)}
    made = plan(source.shapes, target, fresh("key"), fresh("b"))
    transplant(source, made, tmp_path / "out", init=target, format=format)
    found = load(tmp_path / "out")
    assert jax.random.key_data(found["key"]).tolist() == jax.random.key_data(target["key"]).tolist()
    assert found["b"].tolist() == [0, 1, 2] and found["b"].dtype == jnp.bfloat16


def _sizes(source, monkeypatch):
    read, found = type(source).read, []

    def spy(self, name, index=None):
        out = read(self, name, index)
        found.append((name, out.nbytes))
        return out

    monkeypatch.setattr(type(source), "read", spy)
    return found


def test_a_copy_is_read_block_by_block_and_a_cut_reads_only_its_part(tmp_path, source, made, monkeypatch):
    found = _sizes(source, monkeypatch)
    transplant(source, made, tmp_path / "w", init=INIT)
    assert [size for name, size in found if name == "flat"] == [1 << 24, 20_000_000 - (1 << 24)]
    assert [size for name, size in found if name == "qkv"] == [16, 16, 16]
    assert [size for name, size in found if name == "big"] == [838 * 20_000, 262 * 20_000], "blocks of its own digests"


@pytest.mark.parametrize(
    ("write", "order", "sliceable"),
    [(np.savez, "C", True), (np.savez, "F", False), (np.savez_compressed, "C", False)],
)
def test_what_costs_more_in_parts_is_read_whole(tmp_path, monkeypatch, write, order, sliceable):
    array = np.arange(5_000_000, dtype=np.float32).reshape(1000, 5000)
    write(tmp_path / "w.npz", a=np.array(array, order=order))
    source = open(tmp_path / "w.npz")
    assert source.sliceable("a") == sliceable
    found = _sizes(source, monkeypatch)
    transplant(source, plan(source.shapes, {"a": array}), tmp_path / "out")
    assert len(found) == (2 if sliceable else 1) and sum(size for _, size in found) == array.nbytes
    np.testing.assert_array_equal(open(tmp_path / "out")["a"], array)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16, np.int8])
def test_permutations_of_leaves_of_several_blocks(tmp_path, dtype, monkeypatch):
    from transferjax.io import _leafwise

    array = RNG.standard_normal((6, 5, 70)).astype(dtype)
    np.savez(tmp_path / "f.npz", a=np.asfortranarray(array.astype(np.float32)))
    save(tmp_path / "w.npz", {"a": array})
    for name, expected in (("w", array), ("f", array.astype(np.float32))):
        source = open(tmp_path / f"{name}.npz")
        monkeypatch.setattr(_leafwise, "BLOCK", 2000)
        for axes in ((2, 1, 0), (1, 0, 2), (2, 0, 1), (0, 2, 1)):
            target = {"a": np.transpose(expected, axes)}
            made = plan(source.shapes, target, permute("a", axes))
            assert (_leafwise.gathered(source, made, made.moves[0]) == target["a"]).all()


PEAK = """
import sys, numpy as np, jax
from transferjax import io
from transferjax.surgery import permute, plan
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) >> 10
source = io.open(sys.argv[1])
target = {n: jax.ShapeDtypeStruct(s.shape[::-1], s.dtype) for n, s in source.shapes.items()}
made = plan(source.shapes, target, permute("*", (1, 0)))
from transferjax.io import _orbax_stream
import tensorstore
before = peak()
io.transplant(source, made, sys.argv[2])
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    leaf = np.arange(16 << 20, dtype=np.float32).reshape(2048, 8192)  # 64 MiB
    save(tmp_path / "w.safetensors", {f"l{n}": leaf for n in range(16)})
    paths = [str(tmp_path / "w.safetensors"), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", PEAK, *paths], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 2 * 64 + 400
    np.testing.assert_array_equal(open(tmp_path / "out")["l7"], leaf.T)


# What is refused, before anything is written.


def test_something_else_as_a_plan(tmp_path, source):
    with pytest.raises(PlanError, match=r"transplant\(\) expects a Plan second, got dict: write transferjax"):
        transplant(source, {}, tmp_path / "w")


@pytest.mark.parametrize("path", [None, {}, 3])
def test_something_else_as_a_path(source, made, path):
    message = (
        r"transplant\(\) expects the path of a file or directory, got \w+: write transplant\(checkpoint, plan, path\)"
    )
    with pytest.raises(CheckpointError, match=message):
        transplant(source, made, path)


def test_something_else_as_a_source(tmp_path, made):
    with pytest.raises(
        CheckpointError, match=r"transplant\(\) expects an opened checkpoint first, got dict: write trans"
    ):
        transplant(SOURCE, made, tmp_path / "w")


def test_a_path_is_opened(tmp_path, source, made):
    transplant(source.path, made, tmp_path / "w.npz", init=INIT)
    assert len(open(tmp_path / "w.npz")) == len(EXPECTED)


def test_an_ending_that_is_not_written(tmp_path, source, made):
    with pytest.raises(
        CheckpointError, match=r"m5\.bin' ends with \.bin, which is not written here. Expected .safeten"
    ):
        transplant(source, made, tmp_path / "m5.bin", init=INIT)
    assert os.listdir(tmp_path) == []


def test_a_plan_bound_to_another_source(tmp_path, source, made):
    with pytest.raises(PlanError, match="bound to a source with fingerprint 0000"):
        transplant(source, made.with_source("0" * 64), tmp_path / "w", init=INIT)
    transplant(source, made.with_source(source.fingerprint()), tmp_path / "w", init=INIT)


@pytest.mark.parametrize("format", FORMATS)
def test_a_plan_for_another_source(tmp_path, made, format):
    save(tmp_path / "other.npz", {**SOURCE, "flat": np.zeros(6_000_000, np.float32)})
    with pytest.raises(PlanError, match=r"source 'flat' is \(6000000,\) float32; the plan was made for"):
        transplant(open(tmp_path / "other.npz"), made, tmp_path / "w", init=INIT, format=format)
    assert os.listdir(tmp_path) == ["other.npz"]


@pytest.mark.parametrize("ops", [(), (("permute", (1, 0)), ("cast", "float16"))])
def test_a_plan_that_contradicts_itself(tmp_path, ops):
    save(tmp_path / "w.npz", {"a": np.ones((2, 3), np.float32)})
    made = Plan((Move("a", "a", ops),), (), {"a": Spec((4, 2), "float32")}, {"a": Spec((2, 3), "float32")})
    with pytest.raises(PlanError, match=r"'a' came out as .*; the plan promises \(4, 2\) float32"):
        transplant(open(tmp_path / "w.npz"), made, tmp_path / "out")


def test_fresh_leaves_without_init(tmp_path, source, made):
    with pytest.raises(PlanError, match="'head/bias' is fresh, but there is no init"):
        transplant(source, made, tmp_path / "w")


def test_a_plan_without_moves(tmp_path, source):
    with pytest.raises(CheckpointError, match="the plan has no moves, so there is nothing to write"):
        transplant(source, Plan((), tuple(source), {}, {}), tmp_path / "w")


def test_an_existing_path(tmp_path, source, made):
    (tmp_path / "w").mkdir()
    with pytest.raises(CheckpointError, match=r"exists. Choose another path, or pass overwrite=True"):
        transplant(source, made, tmp_path / "w", init=INIT)
    transplant(source, made, tmp_path / "w", init=INIT, overwrite=True)
    assert len(open(tmp_path / "w")) == len(EXPECTED)


def _copying(tmp_path, tree, target=None, *rules):
    save(tmp_path / "s.npz", tree, overwrite=True)
    source = open(tmp_path / "s.npz")
    return source, plan(source.shapes, tree if target is None else target, *rules)


def test_leaves_that_orbax_cannot_hold(tmp_path):
    with pytest.raises(CheckpointError, match=r"no leaf has elements, which Orbax cannot hold. Write with"):
        transplant(*_copying(tmp_path, {"a": np.zeros((0, 2))}), tmp_path / "w")
    with pytest.raises(CheckpointError, match=r"Orbax stores 'a.b' and 'a/b' under one name|stores 'a/b' and 'a.b'"):
        transplant(*_copying(tmp_path, {"a.b": np.zeros(2), "a": {"b": np.zeros(2)}}), tmp_path / "w")
    source, _ = _copying(tmp_path, {"a": np.zeros(2), "b": np.zeros(2)})
    made = plan(source.shapes, {"a": np.zeros(2), "a/b": np.zeros(2)}, rename("b", "a/b"))
    with pytest.raises(CheckpointError, match="Orbax cannot hold these leaves: 'a/b' lies below another leaf"):
        transplant(source, made, tmp_path / "w")
    transplant(source, made, tmp_path / "w.npz")
    source, made = _copying(tmp_path, {"a": np.zeros(2, ml_dtypes.float8_e4m3)})
    with pytest.raises(CheckpointError, match="float8_e4m3, which orbax cannot hold"):
        transplant(source, made, tmp_path / "w")


def test_damage_to_the_source_leaves_nothing(tmp_path):
    tree = {name: RNG.standard_normal((30, 3000)) for name in "abc"}
    save(tmp_path / "s.safetensors", tree)
    data = bytearray((tmp_path / "s.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "s.safetensors").write_bytes(data)
    source = open(tmp_path / "s.safetensors")
    for format in FORMATS:
        with pytest.raises(CheckpointError, match="does not match its digest"):
            transplant(source, plan(source.shapes, tree), tmp_path / "w", format=format)
    assert os.listdir(tmp_path) == ["s.safetensors"]
    assert [thread.name for thread in threading.enumerate() if "ThreadPool" in thread.name] == []


def test_a_full_disk_is_named(tmp_path, source, made, monkeypatch):
    import tensorstore as ts

    class Full:
        def __init__(self, *_, **__):
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nand more")

    monkeypatch.setattr(ts, "Transaction", Full)
    with pytest.raises(CheckpointError, match=r"arrays of '.*' could not be written: RESOURCE_EXHAUSTED: No space"):
        transplant(source, made, tmp_path / "w", init=INIT)
    assert os.listdir(tmp_path) == []


def test_an_unwritable_folder_is_named(tmp_path, source, made):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CheckpointError, match=r"cannot write '.*file/w'"):
        transplant(source, made, tmp_path / "file" / "w", init=INIT)


# Several processes.

TWO = """
import os, sys, jax
me, port, folder, case = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=me)
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from transferjax import io
from transferjax._errors import CheckpointError
from transferjax.surgery import permute, plan
source = io.open(folder + "/w.safetensors")
target = {n: jax.ShapeDtypeStruct(s.shape[::-1], s.dtype) for n, s in source.shapes.items()}
made = plan(source.shapes, target, permute("turned", (1, 0)))
if case == "refused":
    read = type(source).read
    def fails(self, name, index=None):
        if me == 1:
            raise CheckpointError("the disk of process 1 is gone")
        return read(self, name, index)
    type(source).read = fails
    for name in ("out.npz", "out"):
        try:
            io.transplant(source, made, folder + "/" + name)
        except CheckpointError as error:
            print(error)
else:
    report = io.transplant(source, made, folder + "/out", metadata={"n": 2})
    found = io.open(folder + "/out")
    assert found.fingerprint() == report.metadata["fingerprint"]
    mesh = Mesh(np.array(jax.devices()), ("d",))
    where = NamedSharding(mesh, P("d"))
    bytes_read = [0]
    read = type(found).read
    def spy(self, name, index=None):
        out = read(self, name, index)
        bytes_read[0] += out.nbytes
        return out
    type(found).read = spy
    sharded = {n: jax.ShapeDtypeStruct(s.shape, s.dtype) for n, s in found.shapes.items()}
    tree = io.restore(found, plan(found.shapes, sharded), sharded, where)
    for name, leaf in tree.items():
        assert leaf.sharding == where
        for shard in leaf.addressable_shards:
            expected = np.load(folder + f"/{name}.npy", mmap_mode="r")[shard.index]
            assert shard.data.shape[0] * 4 == leaf.shape[0] and (np.asarray(shard.data) == expected).all()
    total = sum(s.size * s.dtype.itemsize for s in found.shapes.values())
    assert bytes_read[0] == total // 2, (bytes_read, total)
    print("ok", sorted(os.listdir(folder + "/out/state")))
jax.distributed.shutdown()
"""


def _two_processes(folder, case):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = lambda me: subprocess.Popen(
        [sys.executable, "-c", TWO, str(me), str(port), str(folder), case],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    running = [start(me) for me in range(2)]
    try:
        done = [process.communicate(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], done
    return [out for out, _ in done]


@pytest.fixture
def folder(tmp_path):
    tree = {
        "turned": RNG.standard_normal((1000, 400)).astype(np.float32),
        "vector": RNG.standard_normal(400_000).astype(np.float32),
        "small": np.arange(8, dtype=np.int32),
    }
    save(tmp_path / "w.safetensors", tree)
    for name, array in tree.items():
        np.save(tmp_path / f"{name}.npy", array.T)
    return tmp_path


def test_two_processes_write_one_directory_and_each_reads_its_slice(folder):
    from orbax.checkpoint import v1 as ocp

    outputs = _two_processes(folder, "write")
    assert all("ok [" in out and "'ocdbt.process_0', 'ocdbt.process_1'" in out for out in outputs), outputs
    tree = ocp.load(folder / "out")
    assert all((tree[name] == np.load(folder / f"{name}.npy")).all() for name in ("turned", "vector", "small"))
    alone = transplant(*_alone(folder), folder / "alone")
    assert open(folder / "out").fingerprint() == alone.metadata["fingerprint"]
    assert not [name for name in os.listdir(folder) if name.startswith(".partial")]


def _alone(folder):
    source = open(folder / "w.safetensors")
    target = {n: jax.ShapeDtypeStruct(s.shape[::-1], s.dtype) for n, s in source.shapes.items()}
    return source, plan(source.shapes, target, permute("turned", (1, 0)))


def test_when_one_process_fails_no_other_waits_or_writes(folder):
    first, second = _two_processes(folder, "refused")
    assert "process 1 could not do its part of" in first and "its own error says why. Nothing was written" in first
    assert "the disk of process 1 is gone" in second
    assert not (folder / "out").exists() and not [n for n in os.listdir(folder) if n.startswith(".partial")]
    for out in (first, second):
        assert "npz is for one process, and 2 cannot write it together. Expected format='orbax'" in out
