"""Orbax directories, v1 and v0."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from transferjax._errors import CheckpointError
from transferjax.io import _manifest, _orbax, load, open, save

TREE = {
    "bb": {"w": np.arange(64.0, dtype=np.float32).reshape(8, 8), "b.c": np.ones(3, ml_dtypes.bfloat16)},
    "layers": [np.arange(3), {"scale": np.array(2.0, np.float16)}],
    "f8": np.ones(2, ml_dtypes.float8_e5m2), "step": 3, "rate": 1.5, "flag": True,
}  # fmt: skip
NAMES = {"bb/w", "bb/b.c", "layers/0", "layers/1/scale", "f8", "step", "rate", "flag"}


@pytest.fixture(scope="module")
def v1(tmp_path_factory):
    from orbax.checkpoint import v1 as ocp

    path = tmp_path_factory.mktemp("v1") / "it"
    tree = {**TREE, "key": jax.random.key(3), "name": "text", "none": None, "j": jnp.ones((2, 2), jnp.bfloat16)}
    ocp.save(path, tree, custom_metadata={"git": "abc"})
    return path


@pytest.fixture(scope="module")
def v0(tmp_path_factory):
    import orbax.checkpoint as ocp

    path = tmp_path_factory.mktemp("v0")
    with ocp.StandardCheckpointer() as saver:
        saver.save(path / "standard", TREE)
    with ocp.CheckpointManager(path / "manager") as manager:
        manager.save(5, args=ocp.args.StandardSave(TREE))
        manager.wait_until_finished()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False)) as saver:
        saver.save(path / "plain", TREE)
    return path


def _check(checkpoint):
    assert set(checkpoint) >= NAMES and checkpoint.format == "orbax" and checkpoint.verified == "unverified"
    for name, array in (("bb/w", TREE["bb"]["w"]), ("bb/b.c", TREE["bb"]["b.c"]), ("f8", TREE["f8"])):
        assert checkpoint.shapes[name].dtype == array.dtype and checkpoint[name].dtype == array.dtype
        assert checkpoint[name].tobytes() == array.tobytes()
    assert checkpoint["step"] == 3 and checkpoint["layers/1/scale"].shape == ()
    np.testing.assert_array_equal(checkpoint.read("bb/w", np.s_[::-3, 2]), TREE["bb"]["w"][::-3, 2])


def test_what_v1_writes(v1):
    checkpoint = open(v1)
    _check(checkpoint)
    assert checkpoint.metadata == {"git": "abc", "name": "text"} and "none" not in checkpoint
    assert checkpoint.kinds == {"key": "key:threefry2x32"}
    assert load(v1)["key"] == jax.random.key(3)
    assert len(checkpoint.fingerprint()) == 64


@pytest.mark.parametrize("name", ["standard", "manager/5", "manager/5/default", "plain"])
def test_what_v0_writes(v0, name):
    _check(open(v0 / name))


def test_a_directory_of_steps_is_no_checkpoint(v0):
    with pytest.raises(CheckpointError, match="is a directory, but no checkpoint"):
        open(v0 / "manager")


def test_orbax_loads_ours(tmp_path):
    from orbax.checkpoint import v1 as ocp

    save(tmp_path / "w", TREE, metadata={"epoch": 3})
    found = ocp.load(tmp_path / "w")
    np.testing.assert_array_equal(found["bb"]["w"], TREE["bb"]["w"])
    assert found["bb"]["b.c"].dtype == ml_dtypes.bfloat16 and (found["step"], found["flag"]) == (3, True)
    assert ocp.metadata(tmp_path / "w").custom_metadata == {"epoch": 3}
    abstract = {"bb": {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=jnp.ones(1).sharding)}}
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        assert isinstance(ocp.load(tmp_path / "w", abstract)["bb"]["w"], jax.Array)


def test_arrays_are_stored_in_chunks_so_that_a_slice_reads_little(tmp_path, monkeypatch):
    monkeypatch.setattr(_orbax, "BLOCK", 1 << 10)
    monkeypatch.setattr(_manifest, "BLOCK", 1 << 10)
    save(tmp_path / "w", {"w": np.arange(1 << 12, dtype=np.float32).reshape(64, 64)})
    import tensorstore as ts

    entry = open(tmp_path / "w")._reader.entries["w"]
    chunk = ts.open(dict(entry.spec), open=True).result().chunk_layout.read_chunk.shape
    assert np.prod(chunk) * 4 <= 1 << 10
    assert open(tmp_path / "w").read("w", np.s_[3, :2]).tolist() == [192, 193]


def test_names_that_orbax_would_store_as_one(tmp_path):
    tree = {"a.b": np.ones(1), "a": {"b": np.zeros(1)}}
    with pytest.raises(CheckpointError, match=r"Orbax stores 'a/b' and 'a.b' under one name. Rename one"):
        save(tmp_path / "w", tree)
    save(tmp_path / "w", tree, format="npz")


def test_only_arrays_without_elements(tmp_path):
    with pytest.raises(CheckpointError, match="no leaf has elements, which Orbax cannot hold"):
        save(tmp_path / "w", {"a": np.zeros((0, 2))})


def test_what_orbax_refuses_is_passed_on(tmp_path, monkeypatch):
    monkeypatch.setattr(_orbax, "_plain", lambda leaf: object())
    with pytest.raises(CheckpointError, match=r"Orbax could not write '.*w': "):
        save(tmp_path / "w", {"a": np.ones(2)})
    assert not list(tmp_path.iterdir())


@pytest.fixture
def hurt(v1, tmp_path):
    shutil.copytree(v1, tmp_path / "it")
    return tmp_path / "it"


def _edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_unfinished_directories(hurt):
    tmp = hurt.rename(hurt.parent / "it.orbax-checkpoint-tmp")
    with pytest.raises(CheckpointError, match="is an Orbax checkpoint that was never finished"):
        open(tmp)


def test_two_checkpoints_in_one(hurt):
    shutil.copytree(hurt / "state", hurt / "other")
    with pytest.raises(CheckpointError, match=r"holds 2 checkpoints: other, state. Open one of them"):
        open(hurt)
    assert "bb/w" in open(hurt / "state")


def test_metadata_that_is_no_tree(hurt):
    (hurt / "state/_METADATA").write_text('{"tree_metadata": [1]}')
    with pytest.raises(CheckpointError, match="_METADATA' is damaged: it does not describe a tree"):
        open(hurt)
    (hurt / "state/_METADATA").write_text("[1]")
    with pytest.raises(CheckpointError, match="_METADATA' is damaged: it does not describe a tree"):
        open(hurt)
    (hurt / "state/_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match="_METADATA' is damaged: it is no JSON"):
        open(hurt)


def test_names_twice(hurt):
    facts = json.loads((hurt / "state/_METADATA").read_text())
    tree = facts["tree_metadata"]
    tree["again"] = tree["('bb', 'w')"]
    (hurt / "state/_METADATA").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=r"names 'bb/w' twice. Expected each name once"):
        open(hurt)


def test_an_array_that_is_missing(hurt):
    _edit(hurt / "state/_METADATA", '"key": "w"', '"key": "v"')
    with pytest.raises(CheckpointError, match=r"'bb/v' in .* is missing: there is no bb\.v/zarr\.json"):
        open(hurt)


def test_key_facts_that_are_damaged(hurt):
    (hurt / "state/array_metadatas/process_0").write_text('{"array_metadatas": 3}')
    with pytest.raises(CheckpointError, match="is damaged: it does not describe arrays"):
        open(hurt)


def test_metadata_of_absurd_length(hurt, monkeypatch):
    monkeypatch.setattr(_orbax, "_LONGEST", 10)
    with pytest.raises(CheckpointError, match="bytes, more than any metadata"):
        open(hurt)


def test_a_missing_data_file(hurt):
    for file in (hurt / "state/d").iterdir():
        file.unlink()
    with pytest.raises(CheckpointError, match="is damaged or incomplete"):
        _check(open(hurt))


def _plain(v0, tmp_path):
    shutil.copytree(v0 / "plain", tmp_path / "plain")
    return tmp_path / "plain"


def test_a_missing_chunk_is_not_zero(v0, tmp_path):
    path = _plain(v0, tmp_path)
    (path / "bb.w/0.0").unlink()
    with pytest.raises(CheckpointError, match=r"'bb/w' in .* is damaged or incomplete"):
        open(path)["bb/w"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"shape":[8,8]', '"shape":[8,9]', "'bb/w' in .* is damaged or incomplete"),
        ('"shape":[8,8]', '"shape":[8,-8]', "it gives no shape and dtype"),
        ('"shape":[8,8]', '"shape":[8,9999999999]', "more than the directory can hold"),
        ('"dtype":"<f4"', '"dtype":"<q9"', "names the dtype '<q9'"),
        ('"dtype":"<f4"', '"dtype":9', "it gives no shape and dtype"),
        ('"dtype":"<f4"', '"dtype":"<f4', "it is no JSON"),
    ],
)
def test_array_headers_that_lie(v0, tmp_path, old, new, message):
    path = _plain(v0, tmp_path)
    _edit(path / "bb.w/.zarray", old, new)
    with pytest.raises(CheckpointError, match=message):
        open(path)["bb/w"]


def test_a_header_that_changes_after_opening(v0, tmp_path):
    path = _plain(v0, tmp_path)
    checkpoint = open(path)
    _edit(path / "bb.w/.zarray", '"shape":[8,8]', '"shape":[8,4]')
    with pytest.raises(CheckpointError, match=r"'bb/w' in .* is damaged or incomplete: shape"):
        checkpoint["bb/w"]


def test_arrays_without_elements_are_kept_beside(tmp_path):
    save(tmp_path / "w", {"a": np.ones(2), "none": np.zeros((0, 3), np.float16)})
    checkpoint = open(tmp_path / "w")
    for found in (checkpoint["none"], checkpoint._reader.entries["none"].box((0, 1), (0, 3))):
        assert found.size == 0 and found.dtype == np.float16
    assert checkpoint.read("none", np.s_[:, 1:]).shape == (0, 2)


def test_a_system_error_while_writing(tmp_path, monkeypatch):
    from orbax.checkpoint import v1 as ocp

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp, "save", full)
    with pytest.raises(CheckpointError, match=r"cannot write '.*w': No space left on device. What was there before"):
        save(tmp_path / "w", {"a": np.ones(2)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["standard", "manager/5", "plain", "v1"])
def test_one_leaf_and_its_slices_need_no_other(v0, v1, tmp_path, name, monkeypatch):
    """What is read is that leaf alone, and of it the chunks that the slice touches."""
    checkpoint = open(v1 if name == "v1" else v0 / name)
    from transferjax.io import _orbax

    asked, original = [], _orbax.Stored.box
    monkeypatch.setattr(
        _orbax.Stored, "box", lambda self, low, high: asked.append((low, high)) or original(self, low, high)
    )
    w = TREE["bb"]["w"]
    for index, box in (
        (np.s_[2:4, ::3], ((2, 0), (4, 7))),
        (np.s_[-1], ((7, 0), (8, 8))),
        (np.s_[..., 5:], ((0, 5), (8, 8))),
        (np.s_[8:], ((0, 0), (0, 8))),
    ):
        np.testing.assert_array_equal(checkpoint.read("bb/w", index), w[index])
        assert asked.pop() == box and not asked
    if name == "plain":  # there each leaf is a directory of its own
        shutil.copytree(v0 / name, tmp_path / "x")
        shutil.rmtree(tmp_path / "x/layers.0")
        (tmp_path / "x/layers.0").mkdir()
        (tmp_path / "x/layers.0/.zarray").write_bytes((v0 / name / "layers.0/.zarray").read_bytes())
        damaged = open(tmp_path / "x")
        np.testing.assert_array_equal(damaged.read("bb/w", 3), w[3])
        with pytest.raises(CheckpointError, match=r"'layers/0' in .* is damaged or incomplete"):
            damaged.read("layers/0")
