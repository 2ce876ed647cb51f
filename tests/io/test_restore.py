"""restore: a file through a plan into a model."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transferjax import Model
from transferjax._errors import CheckpointError, PlanError
from transferjax.io import _leafwise, open, restore, save
from transferjax.surgery import cast, fresh, permute, plan, rename, waive

SOURCE = {
    "fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fc.bias": np.ones(2, np.float32),
    "old": np.zeros(1),
}
RULES = (rename("fc.weight", "head/kernel"), permute("head/kernel", (1, 0)), rename("fc.bias", "head/bias"))
TARGET = {"head": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}


@pytest.fixture(params=["npz", "safetensors", "orbax"])
def source(tmp_path, request):
    save(tmp_path / "w", SOURCE, format=request.param)
    return open(tmp_path / "w")


def _plan(source, target=TARGET, *more):
    return plan(source.shapes, target, *RULES, waive("old"), *more)


def test_a_tree(source):
    found = restore(source, _plan(source), TARGET)
    np.testing.assert_array_equal(found["head"]["kernel"], SOURCE["fc.weight"].T)
    assert found["head"]["bias"].tolist() == [1, 1] and isinstance(found["head"]["bias"], jax.Array)


def test_a_leaf_that_was_bound_to_no_device_stays_free(source):
    bound = jax.device_put(TARGET, jax.devices()[0])
    for target, committed in ((TARGET, False), (bound, True)):
        found = restore(source, _plan(source), target)
        assert {leaf.committed for leaf in jax.tree.leaves(found)} == {committed}


def test_a_model_with_a_fresh_leaf(source):
    model = Model(
        None, None, {**TARGET, "new": {"bias": jnp.full(4, 7.0)}}, {"bn": {"mean": np.full(2, 9, np.float32)}}
    )
    found = restore(source, _plan(source, model, fresh("new/**"), fresh("bn/mean")), model)
    assert isinstance(found, Model) and found.params["new"]["bias"].tolist() == [7] * 4
    mean = found.extra["bn"]["mean"]
    model.extra["bn"]["mean"][:] = 0
    assert isinstance(mean, jax.Array) and mean.tolist() == [9, 9], "the result shares memory with the caller's array"


def test_only_what_the_plan_names_is_read(source, monkeypatch):
    made = _plan(source)
    names, read = [], type(source).read
    monkeypatch.setattr(
        type(source), "read", lambda self, name, index=None: names.append(name) or read(self, name, index)
    )
    restore(source, made, TARGET)
    assert sorted(names) == ["fc.bias", "fc.weight"]


def test_dtypes_change_only_by_the_plans_casts(source):
    target = {"head": {"kernel": jnp.zeros((3, 2), jnp.bfloat16), "bias": jnp.zeros(2)}}
    found = restore(source, _plan(source, target, cast("head/kernel", "bfloat16")), target)
    assert found["head"]["kernel"].dtype == jnp.bfloat16


def test_abstract_targets(source):
    target = jax.eval_shape(lambda: TARGET)
    assert restore(source, _plan(source, target), target)["head"]["bias"].tolist() == [1, 1]


def _mesh():
    return jax.sharding.Mesh(np.array(jax.devices()[:1]), ("d",))


def _spec(*names):
    return jax.sharding.NamedSharding(_mesh(), jax.sharding.PartitionSpec(*names))


def test_every_form_of_sharding(source):
    made, asked = _plan(source), []
    one = restore(source, made, TARGET, _spec())
    tree = restore(source, made, TARGET, {"head": {"kernel": _spec("d"), "bias": _spec()}})

    def function(path, leaf):
        asked.append((path, leaf.shape, str(leaf.dtype)))
        return _spec("d")

    called = restore(source, made, TARGET, function)
    assert one["head"]["kernel"].sharding == _spec() and tree["head"]["kernel"].sharding == _spec("d")
    assert called["head"]["bias"].sharding == _spec("d")
    assert asked == [("head/bias", (2,), "float32"), ("head/kernel", (3, 2), "float32")]
    placed = jax.tree.map(lambda a: jax.device_put(a, _spec("d")), TARGET)
    assert restore(source, made, placed)["head"]["kernel"].sharding == _spec("d")


def test_fresh_leaves_are_placed_too(source):
    target = {**TARGET, "new": jnp.ones(2)}
    made = _plan(source, target, fresh("new"))
    assert restore(source, made, target)["new"] is target["new"]
    assert restore(source, made, target, _spec())["new"].sharding == _spec()


@pytest.mark.parametrize("sharding", [{"head": {"kernel": 3}}, {}, {"head": {"kernel": 3, "bias": 3, "more": 3}}])
def test_a_tree_of_other_things(source, sharding):
    with pytest.raises(PlanError, match=r"sharding has no jax.sharding.Sharding for head/"):
        restore(source, _plan(source), TARGET, sharding)


def test_a_tree_of_too_many(source):
    sharding = {"head": {"kernel": _spec(), "bias": _spec(), "more": _spec()}}
    with pytest.raises(PlanError, match=r"sharding has no .* for paths of its own only"):
        restore(source, _plan(source), TARGET, sharding)


def test_a_plan_bound_to_its_file(source, tmp_path):
    made = _plan(source).with_source(source.fingerprint())
    restore(source, made, TARGET)
    save(tmp_path / "other", {**SOURCE, "fc.bias": np.zeros(2, np.float32)}, format="npz")
    other = open(tmp_path / "other")
    with pytest.raises(PlanError, match=f"bound to a source with fingerprint {source.fingerprint()}; this one has"):
        restore(other, made, TARGET)
    assert restore(other, made.with_source(None), TARGET)["head"]["bias"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({**TARGET, "more": jnp.ones(1)}, "made for another target: only one of the two has more"),
        ({"head": {"kernel": jnp.zeros((3, 2))}}, "made for another target: only one of the two has head/bias"),
        ({"head": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(3)}}, r"'head/bias' is \(3,\) float32 in the target"),
        (
            {"head": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2, jnp.bfloat16)}},
            r"is \(2,\) bfloat16 in the target; the plan was made for \(2,\) float32",
        ),
    ],
)
def test_a_plan_for_another_target(source, target, message):
    with pytest.raises(PlanError, match=message):
        restore(source, _plan(source), target)


def test_wide_leaves_are_not_narrowed(source):
    target = {**TARGET, "old": np.zeros(1)}
    made = plan(source.shapes, target, *RULES)
    with pytest.raises(CheckpointError, match=r"'old' is \(1,\) float64, but JAX made float32 of it"):
        restore(source, made, target)


def test_damage_is_met_while_restoring(tmp_path):
    save(tmp_path / "w", SOURCE, format="safetensors")
    data = bytearray((tmp_path / "w").read_bytes())
    data[-1] ^= 1
    (tmp_path / "w").write_bytes(data)
    checkpoint = open(tmp_path / "w")
    with pytest.raises(CheckpointError, match="does not match its digest"):
        restore(checkpoint, _plan(checkpoint), TARGET)


@pytest.mark.parametrize("format", ["npz", "safetensors", "orbax"])
def test_save_open_restore_is_the_identity(tmp_path, format):
    tree = {"a": [jnp.arange(3), jnp.ones((2, 2), jnp.bfloat16)], "b": {"c": jnp.float16(2.5), "e": jnp.zeros((0, 2))}}
    save(tmp_path / "w", tree, format=format)
    checkpoint = open(tmp_path / "w")
    found = restore(checkpoint, plan(checkpoint.shapes, tree).with_source(checkpoint.fingerprint()), tree)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(tree)):
        assert a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())


SHARDED = """
import sys, jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from transferjax import io
from transferjax.surgery import plan
mesh = Mesh(np.array(jax.devices()), ("d",))
where = NamedSharding(mesh, P("d"))
tree = {"w": jax.device_put(jnp.arange(16.0).reshape(8, 2), where)}
for format in ("npz", "orbax"):
    io.save(sys.argv[1] + format, tree, format=format)
    source = io.open(sys.argv[1] + format)
    found = io.restore(source, plan(source.shapes, tree), jax.eval_shape(lambda: tree), lambda path, leaf: where)
    assert found["w"].sharding == where and len(found["w"].addressable_shards) == 8
    assert (np.asarray(found["w"]) == np.arange(16.0).reshape(8, 2)).all()
    assert io.load(source, like=tree)["w"].sharding == where
"""


def test_eight_devices(tmp_path):
    subprocess.run([sys.executable, "-c", SHARDED, str(tmp_path) + "/"], check=True)


PARTS = """
import sys, jax, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from transferjax import io
from transferjax._errors import CheckpointError
from transferjax.surgery import cast, permute, plan, rename, reshape, split
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
rng = np.random.default_rng(0)
tree = {n: rng.standard_normal((16, 24)).astype(np.float32) for n in ("copy", "cast", "turn", "fold", "qkv")}
io.save(sys.argv[1] + "/w.npz", tree)
source = io.open(sys.argv[1] + "/w.npz")
shapes = {"copy": (16, 24), "cast": (16, 24), "turn": (24, 16), "fold": (8, 48), **dict.fromkeys("qkv", (16, 8))}
target = {n: jax.ShapeDtypeStruct(s, "bfloat16" if n == "cast" else "float32") for n, s in shapes.items()}
rules = [cast("cast", "bfloat16"), permute("turn", (1, 0)), reshape("fold", (8, 48)), split("qkv", [*"qkv"], axis=1)]
made = plan(source.shapes, target, *rules)
expected = {"copy": tree["copy"], "cast": tree["cast"].astype("bfloat16"), "turn": tree["turn"].T}
expected |= {"fold": tree["fold"].reshape(8, 48)} | dict(zip("qkv", np.split(tree["qkv"], 3, axis=1)))

largest, put = [], io._leafwise.jax.make_array_from_callback
def watched(shape, sharding, callback, dtype=None):
    def parts(index):
        part = callback(index)
        largest.append(part.size / np.prod(shape))
        return part
    return put(shape, sharding, parts, dtype=dtype)
jax.make_array_from_callback = watched
jax.device_put = None  # nothing is placed whole

for spec, share in ((P("a", "b"), 8), (P(("a", "b")), 8), (P(None, "b"), 2), (P("a"), 4)):
    where = NamedSharding(mesh, spec)
    largest.clear()
    found = io.restore(source, made, target, where)
    for name, leaf in found.items():
        assert leaf.sharding == where and leaf.dtype == target[name].dtype, name
        for shard in leaf.addressable_shards:
            assert shard.data.size * share == leaf.size
            assert (np.asarray(shard.data) == expected[name][shard.index]).all(), (name, spec)
    assert max(largest) == 1 / share, (spec, max(largest))
try:
    io.restore(source, made, target, NamedSharding(Mesh(np.array(jax.devices()[:7]), ("d",)), P("d")))
except CheckpointError as error:
    print(error)
"""


def test_no_device_holds_a_sharded_leaf_whole(tmp_path):
    done = subprocess.run([sys.executable, "-c", PARTS, str(tmp_path)], check=True, capture_output=True, text=True)
    assert "'cast' (16, 24) bfloat16 cannot be placed in NamedSharding" in done.stdout


def _boxes(made, checkpoint, boxes):
    """What is read for some parts of a leaf, and those parts."""
    asked = []

    class Spied:
        shapes = checkpoint.shapes

        def read(self, name, index=None):
            asked.append(index)
            return checkpoint.read(name, index)

    cut = _leafwise._reader(Spied(), made, made.moves[0], set(boxes))
    return [cut(box) for box in boxes], asked


def test_a_process_reads_the_box_around_its_parts_or_each_alone(tmp_path):
    array = np.arange(48.0).reshape(8, 6)
    save(tmp_path / "w.npz", {"w": array})
    checkpoint = open(tmp_path / "w.npz")
    made = plan(checkpoint.shapes, {"w": array.T}, permute("w", (1, 0)))
    near, asked = _boxes(made, checkpoint, [((0, 0), (3, 4)), ((3, 0), (6, 4))])
    assert asked == [(slice(0, 4), slice(0, 6))]
    np.testing.assert_array_equal(np.concatenate(near), array.T[:, :4])
    far, asked = _boxes(made, checkpoint, [((0, 0), (2, 2)), ((4, 6), (6, 8))])
    assert asked == [(slice(0, 2), slice(0, 2)), (slice(6, 8), slice(4, 6))]
    np.testing.assert_array_equal(far[1], array.T[4:, 6:])


def test_something_else_as_a_plan(source):
    with pytest.raises(PlanError, match=r"expects a Plan second, got NoneType: write transferjax.surgery.plan"):
        restore(source, None, TARGET)


def test_a_path_is_opened(source, tmp_path):
    made = _plan(source)
    for path in (source.path, tmp_path / "w"):
        found = restore(path, made, TARGET)
        assert found["head"]["kernel"].tolist() == SOURCE["fc.weight"].T.tolist()


@pytest.mark.parametrize("wrong", [Model(None, None, TARGET, {}), TARGET, None])
def test_something_else_as_a_checkpoint(source, wrong):
    message = (
        r"restore\(\) expects an opened checkpoint first, got (Model|dict|NoneType): write .*open\(path\), or the path"
    )
    with pytest.raises(CheckpointError, match=message):
        restore(wrong, _plan(source), TARGET)


def test_a_module_of_nnx_is_changed_in_place(tmp_path):
    from flax import nnx

    net = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    save(tmp_path / "w.npz", {"kernel": np.full((3, 2), 2, np.float32), "bias": np.ones(2, np.float32)})
    source = open(tmp_path / "w.npz")
    nnx.update(net, restore(source, plan(source.shapes, nnx.state(net)), nnx.state(net)))
    assert net(jnp.ones((1, 3))).tolist() == [[7, 7]]
