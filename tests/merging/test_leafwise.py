"""leafwise: opened checkpoints, merged leaf by leaf and written so."""

import collections
import concurrent.futures
import functools
import threading
import time
import tracemalloc

import jax
import numpy as np
import pytest

import transferjax as tj
from transferjax._errors import CheckpointError, DataError
from transferjax.merging import (
    dare,
    fisher,
    greedy_soup,
    leafwise,
    rebasin,
    regmean,
    search,
    slerp,
    soup,
    task_arithmetic,
    ties,
)
from transferjax.surgery import plan

RNG = np.random.default_rng(0)


def tree(scale=1.0):
    draw = lambda *shape: (scale * RNG.standard_normal(shape)).astype(np.float32)
    return {"stem": {"kernel": draw(6, 5), "bias": draw(5)}, "step": 7}


@pytest.fixture(scope="module")
def trees():
    return [tree() for _ in range(3)]


@pytest.fixture(scope="module")
def opened(trees, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for number, one in enumerate(trees):
        tj.io.save(folder / f"{number}.safetensors", one)
    return [tj.io.open(folder / f"{number}.safetensors") for number in range(3)]


def test_it_is_a_checkpoint(opened):
    merge = leafwise(ties, opened[0], opened[1:], density=0.5)
    assert isinstance(merge, tj._types.Checkpoint) and merge.format == "merged" and merge.verified == "verified"
    assert list(merge) == list(opened[0].shapes) and len(merge) == 3 and merge.shapes == opened[0].shapes
    assert merge.metadata == {"method": "ties", "density": "0.5"} and merge.kinds == {"step": "int"}
    assert repr(merge) == "Merged(ties, 3 checkpoints, 3 arrays)"
    assert merge == merge and merge != leafwise(ties, opened[0], opened[1:]) and hash(merge) == hash(merge)
    assert "stem/bias" in merge and "stem" not in merge and not merge.sliceable("stem/bias")


@pytest.mark.parametrize("format", ["safetensors", "npz", "msgpack", "orbax"])
def test_transplant_writes_what_the_method_makes_of_whole_trees(format, opened, trees, tmp_path):
    merge = leafwise(ties, opened[0], opened[1:], density=0.5)
    made = plan(merge.shapes, dict(merge.shapes))
    tj.io.transplant(merge, made, tmp_path / "merged", format=format)
    expected = ties(trees[0], trees[1:], density=0.5)
    found = tj.io.load(tmp_path / "merged")
    assert tj.io.fingerprint(found) == tj.io.fingerprint(expected) and found["step"] == 7


def test_a_plan_may_change_the_merge_on_its_way(opened, trees):
    merge = leafwise(soup, opened)
    target = {"kernel": np.zeros((5, 6), np.float32)}
    rules = [tj.surgery.rename("stem/kernel", "kernel"), tj.surgery.permute("kernel", (1, 0))]
    made = plan(merge.shapes, target, *rules, tj.surgery.waive("stem/bias"), tj.surgery.waive("step"))
    np.testing.assert_array_equal(made.apply(merge.read)["kernel"], soup(trees)["stem"]["kernel"].T)


def test_parts_of_a_leaf(opened):
    merge = leafwise(soup, opened)
    np.testing.assert_array_equal(merge.read("stem/kernel", (slice(1, 3), 2)), merge["stem/kernel"][1:3, 2])


def test_methods_of_every_form(opened, trees):
    flat = [{"stem/kernel": one["stem"]["kernel"]} for one in trees]
    squares = [{path: np.square(one[path]) for path in one} for one in opened]
    grams = [{"stem/kernel": np.eye(6) * (number + 1)} for number in range(3)]
    calls = [
        (leafwise(slerp, opened[0], opened[1], 0.3), slerp(flat[0], flat[1], 0.3)),
        (leafwise(fisher, opened, squares), fisher(flat, [{"stem/kernel": one["stem/kernel"]} for one in squares])),
        (leafwise(regmean, opened, grams), regmean(flat, grams)),
        (leafwise(functools.partial(ties, density=0.5), opened[0], opened[1:]), ties(flat[0], flat[1:], density=0.5)),
    ]
    for merge, expected in calls:
        assert merge["stem/kernel"].tobytes() == expected["stem/kernel"].tobytes()
    assert leafwise(regmean, opened, grams)["stem/bias"].shape == (5,)


def test_a_function_of_ones_own(opened, trees):
    def halved(base, tuned):
        return jax.tree.map(lambda a, b: a + (b - a) / 2, base, tuned)

    merge = leafwise(halved, opened[0], opened[1])
    np.testing.assert_allclose(merge["stem/bias"], (trees[0]["stem"]["bias"] + trees[1]["stem"]["bias"]) / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda tree: np.stack([*tree.values()]), r"ours\(\) returned .* for the tree of 'stem/bias'. Expected"),
        (lambda tree: {"other": 1.0}, r"ours\(\) returned a dict of other for the tree of 'stem/bias'"),
        (lambda tree: {k: v[None] for k, v in tree.items()}, r"ours\(\) made \(1, .* of 'stem/bias'; expected \("),
        (
            lambda tree: {k: v.astype(np.float64) for k, v in tree.items()},
            r"float64 of 'stem/bias'; expected .*float32",
        ),
    ],
)
def test_what_a_function_of_ones_own_returns_must_be_the_leaf(result, message, opened):
    def ours(tree):
        return result(tree)

    with pytest.raises(DataError, match=message):
        leafwise(ours, opened[0])["stem/bias"]


def test_the_fingerprint_tells_merges_apart(opened):
    merges = [
        leafwise(soup, opened),
        leafwise(soup, opened[:2]),
        leafwise(soup, opened, [0.2, 0.3, 0.5]),
        leafwise(task_arithmetic, opened[0], opened[1:]),
        leafwise(dare, opened[0], opened[1:], None, 0.5, jax.random.key(0)),
        leafwise(dare, opened[0], opened[1:], None, 0.5, jax.random.key(1)),
        leafwise(regmean, opened, [{"stem/kernel": np.eye(6)}] * 3),
        leafwise(regmean, opened, [{"stem/kernel": 2 * np.eye(6)}] * 3),
    ]
    assert len({merge.fingerprint() for merge in merges}) == len(merges)
    assert leafwise(soup, opened).fingerprint() == merges[0].fingerprint()
    bound = plan(merges[0].shapes, dict(merges[0].shapes)).with_source(merges[0].fingerprint())
    tj.io._restore.opened(merges[0], bound, "transplant")


def test_each_access_reads_one_leaf_of_each():
    read = []

    class Counted(dict):
        def __getitem__(self, path):
            read.append(path)
            return super().__getitem__(path)

    sources = [Counted(a=np.ones(2), b=np.ones(3)) for _ in range(2)]
    merge = leafwise(soup, sources)
    read.clear()
    assert merge["b"].tolist() == [1, 1, 1] and read == ["b", "b"]


def test_no_more_than_a_leaf_of_each_and_the_result_are_in_memory():
    size = 1 << 21

    class Drawn(dict):
        def __getitem__(self, path):
            return np.full(size, float(path), np.float32)

    names = {str(number): jax.ShapeDtypeStruct((size,), np.float32) for number in range(6)}
    sources = [Drawn(names) for _ in range(4)]
    for call in (lambda: leafwise(ties, sources[0], sources[1:]),
                 lambda: leafwise(dare, sources[0], sources[1:], None, 0.5, jax.random.key(0))):  # fmt: skip
        merge = call()
        tracemalloc.start()
        try:
            for path in merge:
                merge[path]
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert most < 6 * 4 * size


@pytest.fixture
def large(tmp_path, monkeypatch):
    """Two checkpoints whose leaves, of several sizes and dtypes, count as large; and what they hold."""
    monkeypatch.setattr(tj.merging._leafwise, "ALONE", 0)
    draw = lambda shape, dtype: RNG.standard_normal(shape).astype(dtype)
    kinds = {"a": ((40, 30), "float32"), "b": ((900,), "float64"), "c": ((7,), "float16"), "d": ((50, 50), "float32")}
    found = [{name: draw(*kind) for name, kind in kinds.items()} for _ in range(2)]
    for number, one in enumerate(found):
        tj.io.save(tmp_path / f"{number}.safetensors", one)
    return [tj.io.open(tmp_path / f"{number}.safetensors") for number in range(2)], found


def test_large_leaves_are_read_into_the_same_memory(large, monkeypatch):
    (one, two), _ = large
    places, read_into = [], type(one).read_into
    monkeypatch.setattr(
        type(one),
        "read_into",
        lambda self, path, out, **once: places.append((self, out.ctypes.data)) or read_into(self, path, out, **once),
    )
    merge = leafwise(soup, [one, two])
    merge["d"]  # the largest comes first here; memory grows with what is asked for
    for path in merge:
        merge[path]
    assert len(places) == 2 * 5 and len(set(places)) == 2 and all(place % 64 == 0 for _, place in places)


@pytest.mark.parametrize(
    "method",
    [
        lambda tree: tree,
        lambda tree: jax.tree.map(lambda leaf: leaf[::1], tree),
        lambda tree: jax.tree.map(jax.numpy.asarray, tree),
        lambda tree: jax.tree.map(jax.device_put, tree),
    ],
)
def test_a_result_is_not_in_that_memory(method, large):
    opened, (_, expected) = large
    with jax.enable_x64(True):
        merge = leafwise(lambda models: method(models[1]), opened)
        found = {path: merge[path] for path in merge}
    for path, array in found.items():
        assert type(array) is np.ndarray
        np.testing.assert_array_equal(array, expected[path])


def test_small_leaves_are_what_the_method_returns_whatever_was_read_before(large, monkeypatch, tmp_path):
    monkeypatch.setattr(tj.merging._leafwise, "ALONE", 1000)
    keyed = {"a": np.ones((40, 30), np.float32), "key": jax.random.key(0)}
    tj.io.save(tmp_path / "squares.safetensors", {"a": keyed["a"]})
    merge = leafwise(lambda models, squares: models[0], [keyed] * 2, [tj.io.open(tmp_path / "squares.safetensors")])
    for _ in range(2):
        assert merge["a"].shape == (40, 30) and merge["key"] is keyed["key"]
    small = leafwise(lambda tree: jax.tree.map(jax.numpy.asarray, tree), large[0][0])
    assert [type(small[path]) for path in "cac"] == [type(small["c"]), np.ndarray, type(small["c"])]
    assert isinstance(small["c"], jax.Array)


def test_the_memory_of_one_thread_is_kept(large):
    opened, _ = large
    merge = leafwise(soup, opened)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(merge.read, [*merge] * 50))
    assert len(merge._spare) <= 2  # a second one only if two threads give theirs back at the same moment


def test_several_threads_read_at_once(large):
    opened, trees = large
    merge, expected = leafwise(soup, opened), soup(trees)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda path: (path, merge[path]), [*merge] * 50))
    for path, array in found:
        np.testing.assert_array_equal(array, expected[path])


def watched(source, monkeypatch, act=lambda path: None):
    """What leaves are read of a source, and the places where they are put; ``act`` is called before each."""
    found, held, read_into = [], [], type(source).read_into

    def read(self, path, out, once):
        assert once
        act(path)
        found.append((self, path, out.ctypes.data))
        held.append(out)  # so that nothing else comes to lie there
        read_into(self, path, out, once=once)

    monkeypatch.setattr(type(source), "read_into", read)
    return found


def test_the_next_leaf_is_read_ahead_into_memory_of_its_own(large, monkeypatch):
    opened, trees = large
    found = watched(opened[0], monkeypatch)
    merge, order = leafwise(soup, opened), ["d", "a", "b", "c", "d", "a"]
    for path, after in zip(order, [*order[1:], None]):
        if after is not None:
            merge.ahead(after)
            merge.ahead(after)  # once more says nothing new
        np.testing.assert_array_equal(merge[path], soup(trees)[path])
    assert sorted(path for one, path, _ in found if one is opened[0]) == sorted(order)
    assert len({place for *_, place in found}) == 4 and len(merge._spare) == 1 and not merge._ahead


def test_results_that_nothing_refers_to_leave_their_memory_to_the_next(large):
    opened, trees = large
    merge, expected = leafwise(soup, opened), soup(trees)
    places = [merge["d"].ctypes.data for _ in range(5)]
    assert len(set(places)) == 1, "each is gone before the next is made"
    kept = [merge["d"], merge["d"][7:9], merge["a"].T, merge["b"].view(np.uint8), merge["d"]]
    for _ in range(3):
        for path in merge:
            np.testing.assert_array_equal(merge[path], expected[path])
    wanted = [expected["d"], expected["d"][7:9], expected["a"].T, expected["b"].view(np.uint8), expected["d"]]
    for one, other in zip(kept, wanted):
        np.testing.assert_array_equal(one, other)
        assert one.flags.writeable
    del kept, one
    assert len(merge._results._spare) == 2, "of the memory of six"


def test_a_leaf_is_read_while_another_is_merged(large, monkeypatch):
    opened, trees = large
    merging = threading.Event()

    def waits(path):
        assert path == "a" or merging.wait(60)

    def method(models):
        merging.set()
        return soup(models)

    watched(opened[0], monkeypatch, waits)

    merge = leafwise(method, opened)
    merge.ahead("b")
    for path in ("a", "b"):
        np.testing.assert_array_equal(merge[path], soup(trees)[path])


def test_at_most_two_leaves_wait(large, monkeypatch):
    opened, trees = large
    found = watched(opened[0], monkeypatch)
    merge = leafwise(soup, opened)
    for path in "abc":
        merge.ahead(path)
    assert [one.path for one in merge._ahead] == ["b", "c"]
    for path in "abc":
        np.testing.assert_array_equal(merge[path], soup(trees)[path])
    for _ in range(600):  # the one that was given up may still be on its way
        if len(found) == 8:
            break
        time.sleep(0.1)
    assert sorted(path for _, path, _ in found) == sorted("aabc" * 2)


def test_what_another_thread_has_taken_is_read_again(large, monkeypatch):
    class Taken(collections.deque):
        def remove(self, one):
            raise ValueError("it was here a moment ago")

    opened, trees = large
    found = watched(opened[0], monkeypatch)
    merge = leafwise(soup, opened)
    merge._ahead = Taken([], 2)
    merge.ahead("a")
    np.testing.assert_array_equal(merge["a"], soup(trees)["a"])
    merge._ahead[0].result()
    assert len(found) == 4 and len({place for *_, place in found}) == 4, "into other memory"


def test_what_is_read_ahead_may_fail_when_it_is_asked_for(large, monkeypatch):
    opened, trees = large
    failing = ["a"]

    def fails(path):
        if path in failing:
            raise CheckpointError("no such luck")

    watched(opened[0], monkeypatch, fails)
    merge = leafwise(soup, opened)
    merge.ahead("a")
    np.testing.assert_array_equal(merge["b"], soup(trees)["b"])
    with pytest.raises(CheckpointError, match="no such luck"):
        merge["a"]
    failing.clear()
    np.testing.assert_array_equal(merge["a"], soup(trees)["a"])


def test_a_small_leaf_is_not_read_ahead(large, monkeypatch):
    opened, _ = large
    monkeypatch.setattr(tj.merging._leafwise, "ALONE", 8)
    found = watched(opened[0], monkeypatch)
    merge = leafwise(soup, opened)
    for path in "ca":
        merge.ahead(path)
    assert [one.path for one in merge._ahead] == ["a"]
    for path in "caca":
        merge[path]
    assert len(found) == 4 and len({place for *_, place in found}) == 2, "the memory is there after a small leaf too"


def test_several_threads_read_ahead(large):
    opened, trees = large
    merge, expected = leafwise(soup, opened), soup(trees)

    def read(path):
        merge.ahead(path)
        return path, merge[path]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read, [*merge] * 50))
    for path, array in found:
        np.testing.assert_array_equal(array, expected[path])


def test_after_an_error_all_is_as_before(large):
    opened, trees = large
    failing = [True]

    def fails(models):
        if failing:
            raise ValueError("not yet")
        return soup(models)

    merge = leafwise(fails, opened)
    with pytest.raises(ValueError, match="not yet"):
        merge["a"]
    failing.clear()
    np.testing.assert_array_equal(merge["a"], soup(trees)["a"])


def test_an_error_in_a_later_leaf_leaves_no_file(large, tmp_path):
    """One leaf is written while the next is made."""

    def fails(models):
        if "d" in models[0]:
            raise ValueError("no d")
        return soup(models)

    merge = leafwise(fails, large[0])
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match="no d"):
        tj.io.transplant(merge, plan(merge.shapes, dict(merge.shapes)), tmp_path / "merged.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("method", [greedy_soup, search, rebasin])
def test_what_looks_at_whole_models_is_not_leafwise(method, opened):
    with pytest.raises(DataError, match=rf"{method.__name__}\(\) looks at whole models, so it cannot merge leaf by"):
        leafwise(method, opened, lambda params: 0.0)


def test_there_is_a_checkpoint():
    with pytest.raises(
        DataError, match=r"leafwise\(\) got no checkpoint. Expected some of transferjax.io.open\(path\)"
    ):
        leafwise(soup, [np.ones(2)])


def test_unlike_checkpoints_are_told_at_once(opened, tmp_path):
    tj.io.save(tmp_path / "other.npz", {"stem": {"kernel": np.ones((6, 5), np.float32)}, "step": 7})
    other = tj.io.open(tmp_path / "other.npz")
    with pytest.raises(DataError, match="model 1 lacks 'stem/bias', which base has"):
        leafwise(ties, opened[0], [opened[1], other])
    with pytest.raises(DataError, match="b lacks 'stem/bias', which a has"):
        leafwise(slerp, opened[0], other, 0.5)


def test_what_is_given_for_no_leaf_is_told_at_once(opened):
    with pytest.raises(DataError, match=r"'stem/kernels' is no leaf of model 0, and something was given.*stem/kernel"):
        leafwise(regmean, opened, [{"stem/kernels": np.eye(6)}] * 3)


def test_a_path_that_is_not_there(opened):
    with pytest.raises(CheckpointError, match=r"the merge has no array 'stem/kernle'. Nearest: stem/kernel"):
        leafwise(soup, opened)["stem/kernle"]
    with pytest.raises(CheckpointError, match=r"the merge has no array 'stem/kernle'. Nearest: stem/kernel"):
        leafwise(soup, opened).ahead("stem/kernle")


def test_what_cannot_be_merged_is_told_when_it_is_read(tmp_path):
    for number, value in enumerate((1.0, np.nan)):
        tj.io.save(tmp_path / f"{number}.npz", {"w": np.full(2, value)})
    merge = leafwise(soup, [tj.io.open(tmp_path / f"{number}.npz") for number in range(2)])
    with pytest.raises(DataError, match="'w' has NaN or infinity in model 1"):
        merge["w"]
