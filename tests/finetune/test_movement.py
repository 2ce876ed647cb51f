"""Movement: how far every weight lies from where it began, and which should not have moved."""

import math
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax.finetune import _movement, movement


def rows(report):
    return {row["path"]: row for row in report.to_dicts()}


def random(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def test_numbers_are_those_of_the_definitions():
    base, change = random(3, 3, 4, 5), 0.1 * random(3, 3, 4, 5, seed=1)
    row = rows(movement({"kernel": base}, {"kernel": base + change}))["kernel"]
    one, other = base.astype(np.float64).ravel(), (base + change).astype(np.float64).ravel()
    apart = other - one
    assert row["state"] == "moved" and row["shape"] == "(3, 3, 4, 5)"
    assert row["norm"] == pytest.approx(np.linalg.norm(one), rel=1e-12)
    assert row["change"] == pytest.approx(np.linalg.norm(apart), rel=1e-12)
    assert row["relative change"] == pytest.approx(np.linalg.norm(apart) / np.linalg.norm(one), rel=1e-12)
    assert row["cosine"] == pytest.approx(one @ other / np.linalg.norm(one) / np.linalg.norm(other), rel=1e-12)
    assert row["largest change"] == np.abs(apart).max()
    shares = np.linalg.svd(apart.reshape(36, 5), compute_uv=False) ** 2
    shares /= shares.sum()
    assert row["effective rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)


@pytest.mark.parametrize("shape", [(40, 6), (6, 40), (2, 2, 3, 30)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e30])
def test_a_low_rank_change_has_that_effective_rank_on_either_side_and_at_any_scale(shape, scale):
    left, right = np.linalg.qr(random(math.prod(shape[:-1]), 3))[0], np.linalg.qr(random(shape[-1], 3, seed=1))[0]
    change = (scale * left @ right.T).reshape(shape).astype(np.float32)
    row = rows(movement({"w": np.zeros(shape, np.float32)}, {"w": change}))["w"]
    assert row["effective rank"] == pytest.approx(3, rel=1e-5)
    assert row["relative change"] is None and row["cosine"] is None


def test_ranks_can_be_left_out_and_vectors_have_none():
    base, tuned = {"b": random(4), "w": random(4, 4)}, {"b": random(4, seed=1), "w": random(4, 4, seed=1)}
    assert movement(base, tuned).column("effective rank")[0] is None
    assert movement(base, tuned, axis=None).column("effective rank") == [None, None]
    with pytest.raises(tj.TransferError, match=r"movement\(\) got axis=1\. Expected -1, 0, or None to leave"):
        movement(base, tuned, axis=1)


def test_kernels_of_torch_have_the_ranks_of_those_with_outputs_last():
    base, tuned = random(3, 2, 4, 7), random(3, 2, 4, 7, seed=1)
    ours = movement({"w": base}, {"w": tuned}).column("effective rank")
    theirs = movement({"w": base.transpose(3, 2, 0, 1)}, {"w": tuned.transpose(3, 2, 0, 1)}, axis=0)
    assert theirs.column("effective rank") == pytest.approx(ours)


def test_leaves_in_several_chunks_are_the_same_as_in_one(monkeypatch):
    base, tuned = {"w": random(30, 7)}, {"w": random(30, 7, seed=1)}
    whole = movement(base, tuned).rows[0]
    monkeypatch.setattr(_movement, "CHUNK", 16)
    assert movement(base, tuned).rows[0] == pytest.approx(whole)


def test_equal_is_bit_for_bit():
    base = {"a": np.array([0.0, np.nan, np.inf], np.float32), "b": np.zeros(2), "c": np.ones(2, jnp.bfloat16)}
    tuned = {"a": base["a"].copy(), "b": -base["b"], "c": np.ones(2, np.float32)}
    found = rows(movement(base, tuned, frozen="**"))
    assert [row["state"] for row in found.values()] == ["equal", "moved", "dtype"]
    assert [row["frozen"] for row in found.values()] == ["kept", "moved!", "moved!"]
    assert [row["change"] for row in found.values()] == [0.0, 0.0, 0.0]


def test_one_bit_of_one_entry_is_a_movement():
    base = random(100, 100)
    tuned = base.copy()
    tuned[7, 7] = np.nextafter(tuned[7, 7], np.float32(np.inf))
    report = movement({"w": base}, {"w": tuned}, frozen="w")
    assert report.column("frozen") == ["moved!"] and report.metadata["frozen leaves that moved"] == 1
    assert report.column("effective rank")[0] == pytest.approx(1)


def test_a_new_head_is_listed_and_the_rest_is_compared():
    base = {"fc": {"kernel": random(4, 9)}, "head": {"kernel": random(4, 9)}, "stem": random(3), "old": random(2)}
    tuned = {"head": {"bias": random(2), "kernel": random(4, 2)}, "stem": random(3), "old": random(2)}
    report = movement(base, tuned, frozen="{stem,fc/*}")
    assert {path: row["state"] for path, row in rows(report).items()} == {
        "fc/kernel": "only in base",
        "head/bias": "only in tuned",
        "head/kernel": "shape",
        "old": "equal",
        "stem": "equal",
    }
    assert rows(report)["head/kernel"]["shape"] == "(4, 9) and (4, 2)"
    assert report.column("frozen") == ["missing!", None, None, None, "kept"]
    facts = report.metadata
    assert (facts["shape"], facts["only in base"], facts["only in tuned"]) == (1, 1, 1)
    assert (facts["frozen leaves"], facts["frozen leaves that moved"]) == (2, 0)
    assert facts["frozen leaves that are missing"] == 1 and facts["share of leaves moved"] == 0


def test_totals_are_of_all_floating_point_entries_and_name_the_largest_movers():
    base = {"a": np.full(4, 2.0), "b": np.zeros(3), "c": np.full(1, 3.0), "count": np.int32(7)}
    tuned = {"a": np.full(4, 3.0), "b": np.ones(3), "c": np.full(1, 3.0), "count": np.int32(900)}
    report = movement(base, tuned)
    assert report.metadata["share of leaves moved"] == 0.75
    assert report.metadata["relative change"] == pytest.approx(math.sqrt(7 / 25))
    assert report.metadata["largest movers"] == "count 128, a 0.5"
    assert report.title == "Movement: 3 of 4 leaves moved"


def test_numbers_sort_as_numbers_under_dots_too():
    tree = {f"layer.{n}.weight": np.ones(1) for n in (10, 2, 1)}
    assert movement(tree, tree).column("path") == ["layer.1.weight", "layer.2.weight", "layer.10.weight"]


def test_what_is_not_finite_is_named():
    report = movement({"a": np.ones((2, 2)), "b": np.ones(2)}, {"a": np.full((2, 2), np.nan), "b": 2 * np.ones(2)})
    assert report.metadata["change is not finite"] == "a" and math.isnan(report.metadata["relative change"])
    assert report.column("effective rank") == [None, None] and report.metadata["largest movers"] == "a nan, b 1"


def test_empty_complex_and_random_key_leaves_are_compared():
    base = {"c": np.array([[1j]]), "empty": np.zeros((0, 3)), "key": jax.random.key(0)}
    tuned = {"c": np.array([[2j]]), "empty": np.zeros((0, 3)), "key": jax.random.key(1)}
    found = rows(movement(base, tuned))
    assert [row["state"] for row in found.values()] == ["moved", "equal", "moved"]
    assert found["c"]["relative change"] == 1 and found["c"]["effective rank"] is None


class Lazy:
    """A checkpoint that notes whether an array is still held when the next is read."""

    def __init__(self, arrays, read):
        self.arrays, self.noted = arrays, read
        self.shapes = {path: jax.ShapeDtypeStruct(a.shape, a.dtype) for path, a in arrays.items()}

    def __getitem__(self, path):
        array = self.arrays[path].copy()
        self.noted.append((path, sum(other() is not None for _, _, other in self.noted), weakref.ref(array)))
        return array


def test_of_checkpoints_one_leaf_of_each_side_is_held_and_others_are_not_read():
    noted = []
    arrays = {"a": random(3, 3), "b": random(4), "old": random(2), "s": random(2)}
    tuned = {"a": random(3, 3), "b": random(4), "s": random(3)}
    report = movement(Lazy(arrays, noted), Lazy(tuned, noted), frozen="*")
    assert report.column("state") == ["equal", "equal", "only in base", "shape"]
    assert [(path, held) for path, held, _ in noted] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def test_files_of_two_formats_compare_with_each_other_and_with_trees(tmp_path):
    params = {"head": {"kernel": random(4, 2)}, "stem": {"kernel": random(3, 4)}}
    moved = {**params, "head": {"kernel": params["head"]["kernel"] + 1}}
    tj.io.save(tmp_path / "a.npz", params, format="npz")
    tj.io.save(tmp_path / "b.safetensors", moved, format="safetensors")
    files = [tj.io.open(tmp_path / name) for name in ("a.npz", "b.safetensors")]
    assert movement(*files) == movement(params, moved) == movement(files[0], moved)
    assert movement(*files).column("state") == ["moved", "equal"]


def test_a_fine_tuned_model_moved_where_it_was_trained_and_nowhere_else(model, make_batches):
    tuning, tx = tj.train("head/**"), optax.sgd(0.1)
    step = tj.make_step(tj.objectives.cross_entropy(model.apply), tuning, tx)
    state, frozen = tj.init(jax.random.key(0), model, tuning, tx)
    for state, _ in tj.fit(step, state, frozen, make_batches(3)):
        pass
    tuned = model._replace(params=tuning.merge(state.trainable, frozen), extra=state.extra)
    report = movement(model, tuned, frozen=~tj.glob("{head/**,seen}"))
    assert {path: row["state"] for path, row in rows(report).items()} == {
        "head/bias": "moved",
        "head/kernel": "moved",
        "seen": "moved",
        "stem/kernel": "equal",
    }
    assert report.metadata["frozen leaves that moved"] == 0
    assert movement(model, tuned, frozen="head/**").metadata["frozen leaves that moved"] == 2


def test_trees_without_a_common_leaf_raise_with_the_nearest():
    base, tuned = {"head": {"kernel": random(2)}, "stem": random(2)}, {"heda": {"kernel": random(2)}}
    with pytest.raises(tj.SelectionError, match=r"movement\(\) found no leaf in both: base has head/kernel, stem"):
        movement(base, tuned)
    with pytest.raises(tj.SelectionError, match=r"Nearest: head/kernel\. Expected the same names: export a run"):
        movement(base, tuned)


def test_a_frozen_selector_that_matches_nothing_raises():
    with pytest.raises(tj.SelectionError, match=r"selector 'stme' matched none of 1 parameter\. Nearest: stem"):
        movement({"stem": random(2)}, {"stem": random(2)}, frozen="stme")


def test_a_path_is_no_side():
    with pytest.raises(tj.TransferError, match=r"movement\(\) got str as tuned. .*transferjax.io.open\(path\)"):
        movement({"bias": np.ones(2)}, "tuned.npz")


def test_what_holds_no_numbers_raises():
    abstract = {"w": jax.ShapeDtypeStruct((2,), np.float32)}
    with pytest.raises(tj.TransferError, match=r"movement\(\): 'w' of tuned is abstract, \(2,\) float32\. Restore it"):
        movement({"w": random(2)}, abstract)
    with pytest.raises(tj.TransferError, match=r"'w' of base is str; expected an array of numbers"):
        movement({"w": "text"}, {"w": "text"})
