"""load: a checkpoint as a tree, nothing cast."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transferjax import Model
from transferjax._errors import CheckpointError
from transferjax.io import load, open, save
from transferjax.io._load import place


@pytest.fixture
def file(tmp_path):
    tree = {"head": {"bias": np.ones(3, np.float32)}, "key": jax.random.key(1), "step": 3, "wide": np.arange(2)}
    save(tmp_path / "w.npz", tree, format="npz")
    return tmp_path / "w.npz"


LIKE = {"head": {"bias": jnp.zeros(3)}, "key": jax.random.key(0), "step": 0, "wide": np.zeros(2, np.int64)}


def test_without_an_outline(file):
    found = load(file)
    assert isinstance(found["head"]["bias"], np.ndarray) and found["step"] == 3 and found["wide"].dtype == np.int64
    assert found["key"] == jax.random.key(1)
    assert load(open(file)).keys() == found.keys()


def test_in_an_outline(file):
    found = load(file, like=LIKE)
    assert isinstance(found["head"]["bias"], jax.Array) and found["head"]["bias"].tolist() == [1, 1, 1]
    assert isinstance(found["wide"], np.ndarray) and found["step"] == 3 and found["key"] == jax.random.key(1)


def test_in_an_abstract_outline_with_shardings(file):
    where = jax.sharding.SingleDeviceSharding(jax.devices()[-1])
    like = jax.eval_shape(lambda: {k: LIKE[k] for k in ("head", "key")}) | {"step": 0, "wide": LIKE["wide"]}
    like["head"]["bias"] = jax.ShapeDtypeStruct((3,), jnp.float32, sharding=where)
    found = load(file, like=like)
    assert found["head"]["bias"].sharding == where and found["key"] == jax.random.key(1)


def test_a_model(tmp_path):
    model = Model(None, None, {"bn": {"scale": jnp.ones(2)}}, {"bn": {"mean": jnp.zeros(2)}})
    save(tmp_path / "w", model, format="npz")
    found = load(tmp_path / "w", like=model)
    assert isinstance(found, Model) and found.extra["bn"]["mean"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"head": {"bias": jnp.zeros(4)}},
            r"'head/bias' in .* is \(3,\) float32; expected \(4,\) float32. Nothing is cast here",
        ),
        ({"head": {"bias": jnp.zeros(3, jnp.bfloat16)}}, r"is \(3,\) float32; expected \(3,\) bfloat16"),
        ({"wide": jnp.zeros(2, jnp.int32)}, r"'wide' in .* is \(2,\) int64; expected \(2,\) int32"),
        ({"step": 0.5}, "'step' in .* is int; expected float"),
        ({"step": jnp.zeros(())}, r"'step' in .* is \(\) int64; expected \(\) float32"),
        ({"wide": 3}, r"'wide' in .* is \(2,\) int64; expected int"),
        ({"wide": jax.random.key(0)}, r"'wide' in .* is \(2,\) int64; expected \(\) key<fry>"),
        ({"key": jax.random.key(0, impl="rbg")}, r"'key' in .* is \(\) key<fry>; expected \(\) key<rbg>"),
        ({"more": jnp.zeros(1)}, r"lacks 1 of 5 leaves: more"),
        ({"head": {"bais": jnp.zeros(3)}}, "lacks 1 of 4 leaves: head/bais. Nearest: head/bias"),
    ],
)
def test_outlines_that_differ(file, change, message):
    with pytest.raises(CheckpointError, match=message):
        load(file, like={**LIKE, **change})


def test_leaves_that_the_outline_lacks(file):
    with pytest.raises(CheckpointError, match=r"has 3 leaves that the tree lacks: key, step, wide. Read single ones"):
        load(file, like={"head": LIKE["head"]})


def test_names_that_are_no_tree(tmp_path):
    np.savez(tmp_path / "w.npz", **{"a": np.ones(1), "a/b": np.ones(1)})
    with pytest.raises(CheckpointError, match="is no tree: 'a/b' lies below another leaf"):
        load(tmp_path / "w.npz")


def test_wide_numbers_are_not_narrowed():
    with pytest.raises(CheckpointError, match=r"'w' is \(2,\) int64, but JAX made int32 of it. Enable 64 bits"):
        place("w", np.arange(2), None)


def test_a_sharding_that_does_not_fit(file):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("a", "b"))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
    with pytest.raises(CheckpointError, match=r"'w' \(3,\) float32 cannot be placed in NamedSharding"):
        place("w", np.ones(3, np.float32), spec)


def test_numpy_scalars(tmp_path):
    save(tmp_path / "w", {"a": np.float32(2)}, format="npz")
    found = load(tmp_path / "w", like={"a": np.float32(0)})
    assert type(found["a"]) is np.float32 and found["a"] == 2
