"""What is computed once per example: kept bit for bit, found again after a kill, never served for another base."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import transferjax as tj
from transferjax._errors import CheckpointError, DataError
from transferjax.io import FeatureCache, _feature_cache, _feature_shards
from transferjax.io._manifest import encode

BASE = "weights:aaaa preprocessing:bbbb program:cccc"
DTYPES = [np.float32, ml_dtypes.bfloat16, np.int8, np.int32, np.float16, np.bool_, ml_dtypes.float8_e4m3fn]


def arrays(ids, width=5):
    """Rows that say which example they are of."""
    ids = np.asarray(ids)
    return {"pooled": (ids[:, None] * 100 + np.arange(width)).astype(np.float32), "label": (ids % 7).astype(np.int32)}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert found[name].tobytes() == np.asarray(array).tobytes(), name


def filled(path, ids, *, shard=8, base=BASE):
    """A folder of full shards of ``shard`` rows."""
    cache = FeatureCache(path, fingerprint=base)
    ids = np.asarray(ids)
    for start in range(0, ids.size, shard):
        cache.add(ids[start : start + shard], arrays(ids[start : start + shard]))
        cache.flush()
    return cache


def parts(path):
    return sorted(name for name in os.listdir(path) if name.startswith("part-"))


# Round trips ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["memory", "folder", "folder without memory", "folder opened again"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_every_dtype_comes_back_bit_for_bit_in_any_order(tmp_path, dtype, where):
    rng = np.random.default_rng(0)
    size = np.dtype(dtype).itemsize
    bits = rng.integers(0, 2 if dtype is np.bool_ else 256, (30, 3, 4 * size), np.uint8)  # NaNs with payloads included
    data = {"a": bits.view(dtype), "row": np.arange(30, dtype=np.int16), "z": np.ones((30, 2), dtype)}
    ids = rng.permutation(30) * 10**12 - 5 * 10**12
    options = {"memory_bytes": 0} if where == "folder without memory" else {}
    cache = FeatureCache(None if where == "memory" else tmp_path / "c", fingerprint=BASE, **options)
    for start in (0, 10, 20):
        cache.add(ids[start : start + 10], {name: array[start : start + 10] for name, array in data.items()})
    if where == "folder opened again":
        cache.flush()
        cache = FeatureCache(tmp_path / "c", fingerprint=BASE)
    assert len(cache) == 30 and cache.bytes == 30 * (12 * size + 2 + 2 * size)
    assert cache.shapes["a"] == jax.ShapeDtypeStruct((3, 4), np.dtype(dtype)) and list(cache.shapes) == [
        "a",
        "row",
        "z",
    ]
    for _ in range(2):  # the second time some of it may be in memory
        order = rng.integers(0, 30, 50)
        same(cache.read(ids[order]), {name: array[order] for name, array in data.items()})
    cache.flush()
    order = rng.permutation(30)
    same(cache.read(ids[order]), {name: array[order] for name, array in data.items()})


def test_arrays_of_jax_are_stored_as_they_are():
    cache = FeatureCache(fingerprint=BASE)
    value = jnp.linspace(0, 1, 6, dtype=jnp.bfloat16).reshape(2, 3)
    cache.add(jnp.array([3, 1]), {"a": value, "view": np.arange(6, dtype=np.float32).reshape(3, 2).T})
    found = cache.read([1, 3])
    same(found, {"a": np.asarray(value)[::-1], "view": np.array([[1, 3, 5], [0, 2, 4]], np.float32)})
    found["a"][:] = 0  # what is read belongs to the caller
    assert cache.read([1])["a"].astype(np.float32).tolist() != [[0, 0, 0]]


def test_rows_without_bytes_and_no_rows_at_all(tmp_path):
    cache = FeatureCache(tmp_path / "c", fingerprint=BASE)
    assert cache.read([]) == {} and cache.missing([]).size == 0 and len(cache) == 0 and cache.shapes == {}
    cache.add([5, 6], {"none": np.zeros((2, 0), np.float32)})
    cache.add([], {"none": np.zeros((0, 0), np.float32)})
    cache.flush()
    again = FeatureCache(tmp_path / "c", fingerprint=BASE, memory_bytes=0)
    assert again.read([6])["none"].shape == (1, 0) and again.read([])["none"].shape == (0, 0) and len(again) == 2


def test_what_is_missing_is_told_once_and_in_order():
    cache = FeatureCache(fingerprint=BASE)
    cache.add([4, 2], arrays([4, 2]))
    assert cache.missing([9, 4, 7, 9, 2, 1]).tolist() == [9, 7, 1] and cache.missing([2, 4]).tolist() == []


def test_the_report_says_what_is_there(tmp_path):
    cache = filled(tmp_path / "c", range(10))
    report = cache.report()
    assert report.rows == (("label", "()", "int32", 4), ("pooled", "(5,)", "float32", 20))
    facts = report.metadata
    assert facts["examples"] == 10 and facts["bytes"] == 240 and facts["shards"] == 2 and facts["fingerprint"] == BASE
    files = [os.path.join(root, name) for root, _, names in os.walk(tmp_path / "c") for name in names]
    assert facts["bytes on disk"] == sum(os.path.getsize(f) for f in files if not f.endswith("cache.json"))
    assert "10 examples of 24 bytes at '" in repr(cache)
    assert repr(FeatureCache(fingerprint=BASE)) == "FeatureCache(0 examples of 0 bytes in memory)"


@pytest.mark.parametrize(("width", "rows"), [(1280, 2000), (192, 20_000)])
def test_the_disk_holds_little_more_than_the_arrays(tmp_path, width, rows):
    cache = FeatureCache(tmp_path / "c", fingerprint=BASE, memory_bytes=0)
    ids = np.random.default_rng(0).permutation(rows)
    cache.add(ids, arrays(ids, width))
    cache.flush()
    facts = cache.report().metadata
    assert facts["bytes"] == rows * (4 * width + 4) and facts["bytes on disk"] <= 1.05 * facts["bytes"]


# Kills and several processes ------------------------------------------------------------------------------------------


def test_a_full_shard_is_written_at_once_and_the_last_one_by_flush(tmp_path, monkeypatch):
    monkeypatch.setattr(_feature_cache, "SHARD_BYTES", 24 * 10)
    cache = FeatureCache(tmp_path / "c", fingerprint=BASE)
    for start in range(0, 30, 6):
        cache.add(range(start, start + 6), arrays(range(start, start + 6)))
    assert parts(tmp_path / "c") == ["part-00000-00000", "part-00000-00001"]
    again = FeatureCache(tmp_path / "c", fingerprint=BASE)
    assert again.missing(range(30)).tolist() == list(range(24, 30))
    cache.flush()
    cache.flush()
    assert len(parts(tmp_path / "c")) == 3
    same(FeatureCache(tmp_path / "c", fingerprint=BASE).read(range(30)), arrays(range(30)))


def test_what_a_kill_left_unfinished_is_no_shard_and_goes_away(tmp_path):
    filled(tmp_path / "c", range(8))
    left = tmp_path / "c" / ".partial-part-00000-00001-0123456789ab" / "new"
    left.mkdir(parents=True)
    (left / "rows.array_record").write_bytes(b"half")
    other = tmp_path / "c" / ".partial-part-00001-00000-0123456789ab"  # another process is at work on this one
    other.mkdir()
    cache = FeatureCache(tmp_path / "c", fingerprint=BASE)
    assert cache.missing(range(16)).tolist() == list(range(8, 16)) and left.exists()
    cache.add(range(8, 16), arrays(range(8, 16)))
    cache.flush()
    assert not left.exists() and other.exists() and parts(tmp_path / "c")[-1] == "part-00000-00001"
    same(FeatureCache(tmp_path / "c", fingerprint=BASE).read(range(16)), arrays(range(16)))


def test_a_run_killed_at_any_time_leaves_whole_shards(tmp_path):
    """A process that writes shards as fast as it can is killed; what is there afterwards is whole."""
    code = """
    import sys, numpy as np
    from transferjax.io import FeatureCache, _feature_cache
    _feature_cache.SHARD_BYTES = 100_000
    cache = FeatureCache(sys.argv[1], fingerprint="weights:a")
    for id_ in range(10**6):
        cache.add([id_], {"a": np.full((1, 5000), id_ % 100, np.int8)})
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "c")])
    until = time.monotonic() + 60
    while time.monotonic() < until and len(os.listdir(tmp_path / "c") if (tmp_path / "c").exists() else []) < 6:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    cache = FeatureCache(tmp_path / "c", fingerprint="weights:a")
    count = len(cache)
    assert count >= 60 and count % 20 == 0
    found = cache.read(range(count))["a"]
    assert (found == (np.arange(count) % 100)[:, None]).all() and found.shape == (count, 5000)


def test_processes_write_side_by_side_and_read_each_others_rows(tmp_path, monkeypatch):
    one, two = (FeatureCache(tmp_path / "c", fingerprint=BASE) for _ in range(2))
    one.add(range(5), arrays(range(5)))
    one.flush()
    two.add(range(3, 9), arrays(range(3, 9)))  # it has not looked since: rows 3 and 4 are there twice now
    assert two.missing(range(10)).tolist() == [9]
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    two.flush()
    assert parts(tmp_path / "c") == ["part-00000-00000", "part-00001-00000"]
    assert two.report().metadata["rows stored twice"] == 0  # flush looked again first
    assert one.missing(range(10)).tolist() == [9] and len(one) == len(two) == 9
    for cache in (one, two, FeatureCache(tmp_path / "c", fingerprint=BASE)):
        same(cache.read([8, 0, 4, 5]), arrays([8, 0, 4, 5]))


def test_of_two_rows_of_one_example_the_first_shard_is_used(tmp_path):
    filled(tmp_path / "c", [1, 2])
    filled(tmp_path / "other", [2, 3])
    cache = FeatureCache(tmp_path / "other", fingerprint=BASE)
    cache.add([1], {name: array + 1 for name, array in arrays([1]).items()})
    cache.flush()
    for number, name in enumerate(parts(tmp_path / "other")):
        shutil.copytree(tmp_path / "other" / name, tmp_path / "c" / f"part-00001-{number:05d}")
    both = FeatureCache(tmp_path / "c", fingerprint=BASE)
    assert len(both) == 3 and both.report().metadata["rows stored twice"] == 2
    same(both.read([3, 2, 1]), arrays([3, 2, 1]))


def test_another_process_that_writes_other_arrays(tmp_path):
    one, two = (FeatureCache(tmp_path / "c", fingerprint=BASE) for _ in range(2))
    one.add([1], arrays([1]))
    two.add([2], arrays([2], width=6))
    one.flush()
    with pytest.raises(CheckpointError, match=r"another process wrote other arrays into '.*c': 'pooled' is \(5,\) fl"):
        two.flush()


def test_shards_of_different_arrays_in_one_folder(tmp_path):
    filled(tmp_path / "c", [1])
    cache = FeatureCache(tmp_path / "other", fingerprint=BASE)
    cache.add([2], {"pooled": np.zeros((1, 5), np.float16)})
    cache.flush()
    shutil.copytree(tmp_path / "other/part-00000-00000", tmp_path / "c/part-00003-00000")
    message = (
        r"part-00003-00000' holds other arrays than the shards before it: 'label' is nothing, stored is \(\) int32"
    )
    with pytest.raises(CheckpointError, match=message):
        FeatureCache(tmp_path / "c", fingerprint=BASE)


def test_more_shards_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(_feature_shards, "OPEN", 2)
    filled(tmp_path / "c", range(10), shard=2)
    cache = FeatureCache(tmp_path / "c", fingerprint=BASE, memory_bytes=0)
    for order in ([9, 0, 5, 2, 7], range(10), [1, 1, 9]):
        same(cache.read(order), arrays(order))


# Memory ---------------------------------------------------------------------------------------------------------------


def test_memory_without_a_folder_ends_with_an_error_and_keeps_what_it_has():
    cache = FeatureCache(fingerprint=BASE, memory_bytes=10 * (24 + _feature_cache.OVERHEAD))
    cache.add(range(8), arrays(range(8)))
    with pytest.raises(DataError, match=r"11 examples need 1,914 bytes of memory, and memory_bytes is 1,740. Give"):
        cache.add(range(8, 11), arrays(range(8, 11)))
    assert len(cache) == 8
    cache.add([8, 9], arrays([8, 9]))
    cache.flush()
    same(cache.read(range(10)), arrays(range(10)))


def test_with_a_folder_the_rows_that_fit_stay_in_memory(tmp_path):
    filled(tmp_path / "c", range(40))
    cache = FeatureCache(tmp_path / "c", fingerprint=BASE, memory_bytes=12 * (24 + _feature_cache.OVERHEAD))
    same(cache.read(range(40)), arrays(range(40)))
    assert cache.report().metadata["examples in memory"] == 12
    shutil.rmtree(tmp_path / "c" / "part-00000-00000")
    same(cache.read(range(12)), arrays(range(12)))
    everything = FeatureCache(tmp_path / "c", fingerprint=BASE)
    everything.read(range(8, 40))
    assert everything.report().metadata["examples in memory"] == 32


# Another base, damage, refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            "weights:xx preprocessing:bbbb program:cccc",
            r"with other weights \(stored 'aaaa', now 'xx'\)\. Give another",
        ),
        ("weights:aaaa preprocessing:bbbb program:x", r"with other program \(stored 'cccc', now 'x'\)\. Give another"),
        ("weights:aaaa preprocessing:x program:y", r"with other preprocessing \(.*\), program \(stored 'cccc', now 'y"),
        ("weights:aaaa preprocessing:bbbb", r"with other program \(stored 'cccc', now none\)"),
        ("version 7", r"with other fingerprint \(stored none, now 'version 7'\)"),
        (f"{BASE} {BASE}", "with other fingerprint. Give another folder, or delete"),
    ],
)
def test_rows_of_another_base_are_never_served(tmp_path, other, message):
    filled(tmp_path / "c", [1])
    with pytest.raises(CheckpointError, match=message):
        FeatureCache(tmp_path / "c", fingerprint=other)
    filled(tmp_path / "d", [2], base=other)
    shutil.copytree(tmp_path / "d/part-00000-00000", tmp_path / "c/part-00001-00000")  # not even one shard of them
    with pytest.raises(CheckpointError, match=r"part-00001-00000/index.json' is of rows that were computed with other"):
        FeatureCache(tmp_path / "c", fingerprint=BASE)


def test_the_fingerprint_has_a_part_for_each_thing_that_counts():
    frozen, preprocess = {"w": np.ones(3, np.float32)}, tj.Preprocess((8, 8))
    program = str(jax.make_jaxpr(lambda x: jax.nn.relu(x))(1.0))
    first = FeatureCache.fingerprint_of(frozen, preprocess, program)
    assert first == FeatureCache.fingerprint_of({"w": jnp.ones(3)}, tj.Preprocess((8, 8)), program)

    def different(*given):
        pairs = zip(first.split(" "), FeatureCache.fingerprint_of(*given).split(" "), strict=True)
        return [a.split(":")[0] for a, b in pairs if a != b]

    assert different({"w": np.ones(3)}, preprocess, program) == ["weights"]
    assert different({"v": np.ones(3, np.float32)}, preprocess, program) == ["weights"]
    assert different(frozen, tj.Preprocess((8, 9)), program) == ["preprocessing"]
    assert different(frozen, "Preprocess", program + " ") == ["preprocessing", "program"]
    assert different(frozen, preprocess, program) == []
    at = [FeatureCache.fingerprint_of(frozen, None, f"call[jvp=<function relu at 0x7f{n}>]") for n in ("aa", "bb")]
    assert at[0] == at[1]
    with pytest.raises(CheckpointError, match=r"the preprocessing prints as <.*: an address says nothing about what"):
        FeatureCache.fingerprint_of(frozen, lambda x: x, program)
    with pytest.raises(CheckpointError, match="the program is function; expected its jaxpr as text"):
        FeatureCache.fingerprint_of(frozen, None, lambda x: x)  # pyright: ignore[reportArgumentType]
    with pytest.raises(CheckpointError, match="expects a tree of arrays"):
        FeatureCache.fingerprint_of({}, None, program)


def flip(path, found):
    """Flips one bit of the first place where these bytes stand."""
    data = bytearray(path.read_bytes())
    data[data.index(found)] ^= 16
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


ROWS, INDEX = "part-00000-00001/rows.array_record", "part-00000-00001/index.json"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: cut(c / ROWS), rf"{ROWS}' is truncated or damaged: expected \d+ bytes, found \d+. Delete '.*00001'"),
        (
            lambda c: flip(c / ROWS, bytes(arrays([9])["pooled"])),
            rf"{ROWS}' is damaged: .*Delete '.*part-00000-00001': its rows are then com",
        ),
        (lambda c: (c / ROWS).unlink(), rf"{ROWS}' cannot be read: No such file or directory. Delete '.*00001'"),
        (lambda c: (c / INDEX).unlink(), rf"{INDEX}' cannot be read: No such file or directory. Delete '.*00001'"),
        (lambda c: flip(c / INDEX, b"aaaa"), rf"the manifest of '.*{INDEX}' does not match its own digest"),
        (lambda c: cut(c / INDEX), rf"the manifest of '.*{INDEX}'"),
        (lambda c: shutil.copy(c / "cache.json", c / INDEX), rf"{INDEX}' belongs to no feature shard. Delete"),
        (lambda c: flip(c / "cache.json", b"aaaa"), "cache.json' does not match its own digest"),
        (lambda c: shutil.copy(c / INDEX, c / "cache.json"), "cache.json' belongs to no feature cache. Give another"),
        (
            lambda c: (c / "cache.json").unlink(),
            r"c' is no feature cache: it holds part-00000-00000, part-00000-00001, part",
        ),
    ],
)
def test_damage_raises_and_names_the_file(tmp_path, damage, message):
    filled(tmp_path / "c", range(24))
    damage(tmp_path / "c")
    with pytest.raises(CheckpointError, match=message):
        FeatureCache(tmp_path / "c", fingerprint=BASE).read(range(24))


def test_damage_after_opening_raises_too(tmp_path):
    cache = filled(tmp_path / "c", range(24))
    cache = FeatureCache(tmp_path / "c", fingerprint=BASE)
    shutil.rmtree(tmp_path / "c" / "part-00000-00001")
    same(cache.read(range(8)), arrays(range(8)))
    with pytest.raises(CheckpointError, match=rf"{ROWS}' cannot be read: No such file"):
        cache.read([9])
    shutil.rmtree(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"'.*c' cannot be read: No such file"):
        cache.missing([99])


def test_a_whole_file_of_other_rows_is_found_by_their_digests(tmp_path):
    """The files of two shards are exchanged: lengths, counts and ArrayRecord's own checksums are right."""
    filled(tmp_path / "c", range(16))
    a, b = (tmp_path / "c" / name / "rows.array_record" for name in parts(tmp_path / "c"))
    a.rename(tmp_path / "moved")
    b.rename(a)
    (tmp_path / "moved").rename(b)
    with pytest.raises(CheckpointError, match=r"the row of example 3 does not match its digest. Delete '.*00000'"):
        FeatureCache(tmp_path / "c", fingerprint=BASE).read([3])


def test_any_damage_to_a_file_of_rows_raises_or_changes_nothing(tmp_path, kit):
    cache, wanted = FeatureCache(tmp_path / "c", fingerprint=BASE), arrays(range(200), width=300)
    cache.add(range(200), wanted)
    cache.flush()
    where = tmp_path / "c" / "part-00000-00000" / "rows.array_record"
    good, raised = where.read_bytes(), 0
    for seed in range(120):
        data = kit.damaged(good, seed)
        where.write_bytes((data + good[len(data) :])[: len(good)] if seed % 2 else data)  # half of them of equal length
        try:
            same(FeatureCache(tmp_path / "c", fingerprint=BASE).read(range(200)), wanted)
        except CheckpointError as error:
            raised += str(where) in str(error)
    assert raised >= 80


def test_a_newer_version_raises(tmp_path):
    (tmp_path / "c").mkdir()
    body = json.loads(encode({}, {"kind": "feature cache", "fingerprint": BASE}))
    body = {name: value for name, value in body.items() if name != "sha256"} | {"version": 9}
    from transferjax.io._manifest import _text_digest

    (tmp_path / "c/cache.json").write_text(json.dumps(body | {"sha256": _text_digest(body)}))
    with pytest.raises(CheckpointError, match="was written by a newer version"):
        FeatureCache(tmp_path / "c", fingerprint=BASE)


@pytest.mark.parametrize("name", ["photo.jpg", "checkpoint/_METADATA"])
def test_a_foreign_folder_is_left_alone(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(CheckpointError, match=r"is no feature cache: it holds (photo.jpg|checkpoint). Give a new or"):
        FeatureCache(tmp_path, fingerprint=BASE)
    assert os.listdir(tmp_path) == [name.split("/")[0]]
    with pytest.raises(CheckpointError, match=r"is no feature cache: it is a file. Give a new or empty folder"):
        FeatureCache(tmp_path / name, fingerprint=BASE)


LIMITED = """
import os, resource, sys, numpy as np
from transferjax._errors import CheckpointError
from transferjax.io import FeatureCache
cache = FeatureCache(sys.argv[1], fingerprint="weights:a")
cache.add([1], {"a": np.ones((1, 10))})
cache.flush()
rows = np.random.default_rng(0).normal(size=(40_000, 10))
cache.add(range(2, 40_002), {"a": rows})
before = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))  # no file may grow beyond 1 MiB: like a full disk
try:
    cache.flush()
except CheckpointError as error:
    assert "cannot write '" in str(error) and "part-00000-00001" in str(error) and "File too large" in str(error), error
    assert sorted(os.listdir(sys.argv[1])) == ["cache.json", "part-00000-00000"]
    assert len(FeatureCache(sys.argv[1], fingerprint="weights:a")) == 1
    assert cache.read([40_001])["a"].tobytes() == rows[-1:].tobytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    cache.flush()
    assert len(FeatureCache(sys.argv[1], fingerprint="weights:a")) == 40_001
    print("kept")
"""


def test_a_full_disk_leaves_what_was_there_and_flush_can_be_tried_again(tmp_path):
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "c")]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.stdout.strip() == "kept", out.stderr[-2000:]


def test_a_folder_that_refuses(tmp_path, monkeypatch):
    cache = filled(tmp_path / "c", range(8))
    cache.add([9], arrays([9]))

    def refuse(path, *rest):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("transferjax.io._beside.os.mkdir", refuse)
    with pytest.raises(CheckpointError, match=r"cannot write '.*part-00000-00001': Permission denied"):
        cache.flush()
    with pytest.raises(CheckpointError, match=r"cannot write '.*new/cache.json': Permission denied"):
        FeatureCache(tmp_path / "new", fingerprint=BASE)
    same(cache.read([9, 3]), arrays([9, 3]))
    same(FeatureCache(tmp_path / "c", fingerprint=BASE).read([3]), arrays([3]))  # reading writes nothing

    def unreadable(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("transferjax.io._feature_shards.os.listdir", unreadable)
    with pytest.raises(CheckpointError, match=r"'.*c' cannot be read: Permission denied"):
        FeatureCache(tmp_path / "c", fingerprint=BASE)


def test_without_array_record_the_error_says_what_to_install(tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path / "c", fingerprint=BASE)
    cache.add([1], arrays([1]))
    monkeypatch.setitem(sys.modules, "array_record.python", None)
    with pytest.raises(CheckpointError, match=r"needs the package array_record, which is not installed. .*pip install"):
        cache.flush()


# Bad arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fingerprint": " "}, r"FeatureCache\(\) expects a fingerprint of text, got ' '"),
        ({"fingerprint": 3}, r"FeatureCache\(\) expects a fingerprint of text, got 3"),
        ({"path": 3, "fingerprint": "a"}, r"FeatureCache\(\) expects the path of a file or directory, got int"),
        ({"fingerprint": "a", "memory_bytes": -1}, "memory_bytes is -1; expected a whole number of bytes"),
        ({"fingerprint": "a", "memory_bytes": "1G"}, "memory_bytes is '1G'; expected a whole number of bytes"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(CheckpointError, match=message):
        FeatureCache(**arguments)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1.0, 2.0], r"ids are \(2,\) float64; expected integers of shape \[B\]"),
        (3, r"ids are \(\) int64; expected integers of shape \[B\]"),
        ([[1], [2]], r"ids are \(2, 1\) int64; expected integers"),
        ([True, False], r"ids are \(2,\) bool; expected integers"),
        (["a"], r"ids are \(1,\) <U1; expected integers"),
        ([[1], [2, 3]], r"ids are no integers of shape \[B\], one per example: "),
        (None, r"ids are \(\) object; expected integers"),
        (np.array([1 << 63], np.uint64), r"an id is 9223372036854775808; expected ids below 2\*\*63"),
        (jnp.ones(2), r"ids are \(2,\) float32; expected integers"),
    ],
)
def test_ids_that_are_none(ids, message):
    cache = FeatureCache(fingerprint=BASE)
    for verb in (cache.missing, cache.read, lambda ids: cache.add(ids, {})):
        with pytest.raises(DataError, match=message):
            verb(ids)


@pytest.mark.parametrize(
    ("ids", "given", "message"),
    [
        ([4, 1], arrays([4, 1]), "example 1 is stored already, or stands in the ids twice. Add the rows of missing"),
        ([5, 6, 5], arrays([5, 6, 5]), "example 5 is stored already, or stands in the ids twice"),
        ([5], arrays([5, 6]), r"'label' is \(2,\) int32; expected 1 rows, one per id"),
        ([5], {"pooled": np.float32(3)}, r"'pooled' is \(\) float32; expected 1 rows"),
        ([5], arrays([5], width=6), r"differ from those stored: 'pooled' is \(6,\) float32, stored is \(5,\) float32"),
        ([5], {"pooled": np.zeros((1, 5), np.float32)}, r"'label' is nothing, stored is \(\) int32"),
        ([5], {}, "the arrays to store are a dict of nothing; expected a dict of name: array"),
        ([5], np.zeros((1, 5)), r"the arrays to store are \(1, 5\) float64; expected a dict"),
        ([5], {3: np.zeros((1, 5))}, "an array has the name 3; expected text"),
        ([5], {"pooled": [[1.0]]}, r"'pooled' is list; expected an array of numbers of shape \[B, ...\]"),
        ([5], {"pooled": 1.0}, "'pooled' is float; expected an array of numbers"),
        ([5], {"key": jax.random.split(jax.random.key(0), 1)}, r"'key' is \(1,\) key<fry>; expected an array of num"),
    ],
)
def test_arrays_that_do_not_fit(ids, given, message):
    cache = FeatureCache(fingerprint=BASE)
    cache.add([1, 2], arrays([1, 2]))
    with pytest.raises(DataError, match=message):
        cache.add(ids, given)
    assert len(cache) == 2 and cache.shapes["pooled"].shape == (5,)


def test_arrays_of_text_and_donated_ones():
    cache = FeatureCache(fingerprint=BASE)
    with pytest.raises(CheckpointError, match="Expected an array of numbers"):
        cache.add([1], {"a": np.array(["text"])})
    gone = jnp.ones(1)
    gone.delete()
    with pytest.raises(CheckpointError, match="was donated and is gone"):
        cache.add([1], {"a": gone})


def test_reading_what_is_not_stored():
    cache = FeatureCache(fingerprint=BASE)
    with pytest.raises(
        DataError, match=r"8 of 8 examples are not stored: ids 0, 1, 2, 3, 4 and 3 more. Add the rows of"
    ):
        cache.read(range(8))


# The cache around batches ---------------------------------------------------------------------------------------------


def batches(epochs, count=20, size=4, seed=0):
    """Epochs of shuffled batches; the last one of each is filled up with its first example."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(count)
        for start in range(0, count, size):
            ids = order[start : start + size]
            weight = (np.arange(size) < len(ids)).astype(np.float32)
            ids = np.concatenate([ids, np.repeat(ids[:1], size - len(ids))])
            yield {"inputs": ids[:, None] * np.ones(3, np.float32), "labels": ids % 3, "id": ids, "weight": weight}


class Prefix:
    """Counts the examples it is called with."""

    def __init__(self):
        self.ids = []

    def __call__(self, batch):
        self.ids += batch["id"].tolist()
        return {"total": jnp.asarray(batch["inputs"].sum(axis=1), jnp.bfloat16), "labels": batch["labels"]}


@pytest.mark.parametrize("folder", [False, True])
def test_the_first_epoch_computes_and_later_ones_read(tmp_path, folder):
    prefix, cache = Prefix(), FeatureCache(tmp_path / "c" if folder else None, fingerprint=BASE)
    outs = list(cache.cached(batches(3, count=22), prefix))
    assert len(outs) == 18 and len(prefix.ids) == 24 and set(prefix.ids) == set(range(22))
    for out, batch in zip(outs, batches(3, count=22), strict=True):
        assert list(out) == ["labels", "total", "id", "weight"] and out["id"] is not None
        same(
            out,
            {**{k: np.asarray(v) for k, v in Prefix()(batch).items()}, "id": batch["id"], "weight": batch["weight"]},
        )
    if folder:
        again = FeatureCache(tmp_path / "c", fingerprint=BASE)
        assert len(list(again.cached(batches(1, count=22), lambda batch: pytest.fail("nothing is missing")))) == 6


def test_a_batch_without_weight_yields_none():
    outs = list(FeatureCache(fingerprint=BASE).cached([{"id": [1, 2]}], lambda batch: {"a": np.ones((2, 3))}))
    assert list(outs[0]) == ["a", "id"] and outs[0]["id"] == [1, 2]


def test_an_epoch_that_was_broken_off_goes_on_from_where_it_was(tmp_path):
    prefix, cache = Prefix(), FeatureCache(tmp_path / "c", fingerprint=BASE)
    turns = cache.cached(batches(1), prefix)
    for _ in range(2):
        next(turns)
    turns.close()
    assert len(prefix.ids) == 8
    again, rest = FeatureCache(tmp_path / "c", fingerprint=BASE), Prefix()
    assert len(again) == 8
    list(again.cached(batches(1), rest))
    assert sorted(prefix.ids + rest.ids) == list(range(20))


def test_an_error_in_the_prefix_keeps_the_rows_before_it(tmp_path):
    prefix, cache = Prefix(), FeatureCache(tmp_path / "c", fingerprint=BASE)

    def failing(batch):
        if len(prefix.ids) == 12:
            raise FloatingPointError("NaN")
        return prefix(batch)

    with pytest.raises(FloatingPointError):
        list(cache.cached(batches(1), failing))
    assert len(FeatureCache(tmp_path / "c", fingerprint=BASE)) == 12


@pytest.mark.parametrize(
    ("batch", "compute", "message"),
    [
        ({"inputs": 1}, Prefix(), "a batch is a dict of inputs; expected a dict with 'id', one integer per example"),
        (np.zeros(3), Prefix(), r"a batch is \(3,\) float64; expected a dict with 'id'"),
        ({"id": [1]}, lambda batch: np.zeros(1), r"compute\(\) returned \(1,\) float64; expected a dict of arrays"),
        (
            {"id": [1]},
            lambda batch: {"id": np.zeros(1)},
            r"compute\(\) returned a dict of id; expected a dict of arrays w",
        ),
        ({"id": [1]}, lambda batch: {"weight": np.zeros(1)}, r"compute\(\) returned a dict of weight; expected a dict"),
        ({"id": [1]}, lambda batch: {"a": np.zeros(2)}, r"'a' is \(2,\) float64; expected 1 rows, one per id"),
        ({"id": [1]}, lambda batch: {}, "the arrays to store are a dict of nothing"),
    ],
)
def test_batches_and_prefixes_that_do_not_fit(batch, compute, message):
    with pytest.raises(DataError, match=message):
        list(FeatureCache(fingerprint=BASE).cached([batch], compute))


def test_something_else_than_a_function_raises_at_once():
    with pytest.raises(DataError, match=r"cached\(\) expects a function of a batch second, got dict"):
        FeatureCache(fingerprint=BASE).cached([], {})  # pyright: ignore[reportArgumentType]
