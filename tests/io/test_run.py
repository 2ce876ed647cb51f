"""Run directories: what is written is whole, what is resumed ends with the same bits, what does not fit raises."""

import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax.io import Run, fingerprint
from transferjax.io._beside import TEMPORARY, write_bytes


def apply(params, extra, inputs, *, key=None, train=False):
    hidden = jnp.tanh(inputs @ params["stem"]["kernel"])
    if train is not False:
        hidden = hidden + 0.01 * jax.random.normal(key, hidden.shape)
        extra = {"mean": 0.9 * extra["mean"] + 0.1 * hidden.mean(0)}
    return (hidden - extra["mean"]) @ params["head"]["kernel"] + params["head"]["bias"], extra


def make_model(seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "stem": {"kernel": jax.random.normal(keys[0], (4, 8))},
        "head": {"kernel": jax.random.normal(keys[1], (8, 3)), "bias": jnp.zeros(3)},
    }
    return tj.Model(apply, None, params, {"mean": jnp.zeros(8)})


def make_batches(start, stop):
    for number in range(start, stop):
        rng = np.random.default_rng(number)
        yield {"inputs": rng.normal(size=(4, 4)).astype(np.float32), "labels": rng.integers(0, 3, 4)}


TUNINGS = {
    "head": tj.train("head/**"),
    "full": tj.full(),
    "head+lora": tj.chain(head=tj.train("head/**"), lora=tj.lora("stem/kernel", rank=2)),
}
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))


def start(tuning="head", seed=0, tx=TX, model=None):
    model = make_model() if model is None else model
    return tj.init(jax.random.key(seed), model, TUNINGS[tuning], tx)


def make_step(tuning="head"):
    return tj.make_step(tj.objectives.cross_entropy(apply), TUNINGS[tuning], TX)


def train(state, frozen, step, begin, end):
    return list(tj.fit(step, state, frozen, make_batches(begin, end)))[-1][0]


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert fingerprint(a) == fingerprint(b)


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "run", {"seed": 0})


@pytest.mark.parametrize("tuning", TUNINGS)
def test_a_state_with_holes_and_a_typed_key_comes_back_bit_for_bit(run, tuning):
    state, frozen = start(tuning)
    state = train(state, frozen, make_step(tuning), 0, 2)
    run.save(state, fingerprint(frozen), {"epoch": 1, "position": [3, 4]})
    like, frozen = start(tuning)
    restored, batches_state = run.restore(like, fingerprint(frozen), seed=0)
    same_bits(restored, state)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))
    assert batches_state == {"epoch": 1, "position": [3, 4]}


@pytest.mark.parametrize("tuning", TUNINGS)
def test_running_on_after_a_restore_gives_the_same_bits_as_never_stopping(run, tuning):
    step = make_step(tuning)
    through = train(*start(tuning), step, 0, 5)
    state, frozen = start(tuning)
    run.save(train(state, frozen, step, 0, 2), "base")
    like, frozen = start(tuning)
    resumed, _ = run.restore(like, "base")
    same_bits(train(resumed, frozen, step, 2, 5), through)


def test_every_kind_of_leaf_is_kept(run):
    leaves = {
        "half": jnp.array([1.5, -2.0], jnp.bfloat16),
        "tiny": jnp.array([1, -2], jnp.int4),
        "flag": jnp.array(True),
        "empty": jnp.zeros((0, 3)),
        "count": 7,
        "dots.in/a name": jnp.ones(2),
        "keys": jax.random.split(jax.random.key(3), 2),
        "other": jax.random.key(1, impl="rbg"),
        "holes": [tj.Hole(), jnp.arange(3), tj.Hole()],
        "nothing": None,
    }
    state = tj.FinetuneState(jnp.array(4), jax.random.key(0), {"a": jnp.ones(1)}, {}, leaves)
    run.save(state, "base", b"\x00\x01")
    like = jax.tree.map(lambda leaf: leaf if isinstance(leaf, int) else jnp.zeros_like(leaf), leaves)
    like = {**like, "keys": leaves["keys"], "other": jax.random.key(9, impl="rbg")}
    restored, batches_state = run.restore(
        tj.FinetuneState(jnp.array(0), jax.random.key(0), {"a": jnp.zeros(1)}, {}, like), "base"
    )
    same_bits(restored, state)
    assert batches_state == b"\x00\x01"
    assert restored.opt_state["other"].dtype == leaves["other"].dtype


def test_an_abstract_state_is_enough_to_restore(run):
    state, _ = start()
    run.save(state, "base")
    like = jax.eval_shape(lambda: start()[0])
    same_bits(run.restore(like, "base")[0], state)


def test_checkpoints_hold_no_frozen_weight(run):
    state, _ = start("head")
    run.save(state, "base")
    manifest = json.loads((run.path / "checkpoints/0/manifest.json").read_text())["body"]
    assert [name for name in manifest["leaves"] if name.startswith("trainable/")] == [
        "trainable/head/bias",
        "trainable/head/kernel",
    ]


def test_only_the_newest_checkpoints_stay(run):
    for state, _ in tj.fit(make_step(), *start(), make_batches(0, 4)):
        run.save(state, "base", keep=2)
    assert run.steps == (3, 4) and run.latest == 4
    assert int(run.read(start()[0], "base", step=3)[0].step) == 3


def test_saving_a_step_again_replaces_it(run):
    state, _ = start()
    run.save(state, "base", "first")
    run.save(state, "base", "second")
    assert run.steps == (0,) and run.restore(state, "base")[1] == "second"
    assert sorted(os.listdir(run.path / "checkpoints")) == ["0"]


def test_what_a_killed_save_left_is_ignored_and_removed(run):
    leftover = run.path / "checkpoints" / f"{TEMPORARY}7-abc"
    leftover.mkdir()
    assert run.latest is None
    run.save(start()[0], "base")
    assert not leftover.exists() and run.latest == 0


MISFITS = {
    "seed": (lambda: start(), "base", 1, "was started with another seed: 0, not 1"),
    "key": (lambda: start(seed=1), "base", None, "its random key differs"),
    "base": (lambda: start(), "other", 0, "trained on another base: its fingerprint is base, the one given is other"),
    "tuning": (lambda: start("full"), "base", 0, "another tuning: only in this run: trainable/stem/kernel"),
    "adapters": (lambda: start("head+lora"), "base", 0, "another tuning: only in the checkpoint: trainable/head/bias"),
    "optimizer": (
        lambda: start(tx=optax.sgd(0.1)),
        "base",
        0,
        "another optimizer: only in the checkpoint: opt_state/1",
    ),
    "model": (
        lambda: start(model=make_model()._replace(extra={"mean": jnp.zeros(4)})),
        "base",
        0,
        r"another model: 'extra/mean' was \(8,\) float32 and is \(4,\) float32",
    ),
    "kind of key": (
        lambda: (tj.FinetuneState(**{**vars(start()[0]), "key": jax.random.key(0, impl="rbg")}), None),
        "base",
        0,
        "another kind of random key",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_resuming_into_something_else_raises(run, name):
    make, base, seed, message = MISFITS[name]
    run.save(start()[0], "base")
    with pytest.raises(tj.CheckpointError, match=message):
        run.restore(make()[0], base, seed)


def test_restoring_without_a_checkpoint_says_which_are_there(run):
    with pytest.raises(tj.CheckpointError, match=r"has no checkpoint yet. There: none"):
        run.restore(start()[0], "base")
    run.save(start()[0], "base")
    with pytest.raises(tj.CheckpointError, match=r"has no checkpoint of step 9. There: 0"):
        run.read(start()[0], "base", step=9)


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_arrays_raise(run, damage):
    state = tj.FinetuneState(jnp.array(1), jax.random.key(0), {"a": jnp.arange(50_000.0)}, {}, ())
    run.save(state, "base")
    victim = largest_file(run.path / "checkpoints/1/arrays")
    raw = bytearray(victim.read_bytes())
    if damage == "remove":
        victim.unlink()
    else:
        raw[len(raw) // 2] ^= 1
        victim.write_bytes(raw if damage == "flip" else raw[: len(raw) // 2])
    with pytest.raises(tj.CheckpointError, match="damaged"):
        run.restore(state, "base")


def test_a_damaged_manifest_raises(run):
    state, _ = start()
    run.save(state, "base")
    where = run.path / "checkpoints/0/manifest.json"
    text = where.read_text()
    where.write_text(text.replace('"step": 0', '"step": 1'))
    with pytest.raises(tj.CheckpointError, match="its digest does not match"):
        run.restore(state, "base")
    where.write_text(text[:50])
    with pytest.raises(tj.CheckpointError, match="it is no manifest of a checkpoint"):
        run.restore(state, "base")
    where.unlink()
    with pytest.raises(tj.CheckpointError, match="cannot be read: No such file"):
        run.restore(state, "base")


def test_a_manifest_of_a_newer_version_raises(run, monkeypatch):
    monkeypatch.setattr("transferjax.io._state.VERSION", 2)
    state, _ = start()
    run.save(state, "base")
    monkeypatch.undo()
    with pytest.raises(tj.CheckpointError, match="has version 2; this transferjax reads up to 1"):
        run.restore(state, "base")


def test_a_leaf_that_is_no_array_cannot_be_saved(run):
    state = tj.FinetuneState(jnp.array(0), jax.random.key(0), {"a": object()}, {}, ())
    with pytest.raises(tj.CheckpointError, match="'trainable/a' is object, which a checkpoint cannot hold"):
        run.save(state, "base")


def test_arguments_of_save_are_checked(run, monkeypatch):
    with pytest.raises(tj.CheckpointError, match="keep at least 1 checkpoint, got 0"):
        run.save(start()[0], "base", keep=0)
    with pytest.raises(tj.CheckpointError, match="state of the batches must be JSON or bytes"):
        run.save(start()[0], "base", object())
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(tj.CheckpointError, match="writes from one process; 2 run"):
        run.save(start()[0], "base")


# Creation -------------------------------------------------------------------------------------------------------------


def test_config_and_plan_are_there_after_opening(tmp_path):
    plan = tj.surgery.plan({"w": np.zeros(2)}, {"bias": np.zeros(2)}, tj.surgery.rename("w", "bias"))
    Run.create(tmp_path / "a/b/run", {"seed": 3, "tuning": "full"}, plan)
    opened = Run.open(tmp_path / "a/b/run")
    assert opened.config == {"seed": 3, "tuning": "full"} and opened.plan == plan
    assert sorted(os.listdir(opened.path)) == ["checkpoints", "config.json", "plan.json"]


def test_a_run_without_a_plan_has_none(run):
    assert run.plan is None


def test_a_directory_that_holds_something_is_left_alone(tmp_path, run):
    with pytest.raises(tj.CheckpointError, match=r"already holds a run. Resume it, or choose another directory"):
        Run.create(run.path, {})
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    with pytest.raises(tj.CheckpointError, match=r"already exists and is no run. Expected a new or empty directory"):
        Run.create(tmp_path / "full", {})
    assert (tmp_path / "full/thesis.txt").read_text() == "mine"


def test_an_empty_directory_becomes_a_run(tmp_path):
    (tmp_path / "empty").mkdir()
    assert Run.create(tmp_path / "empty", {}).latest is None


def test_a_config_must_be_json(tmp_path):
    with pytest.raises(tj.CheckpointError, match="config of a run must be plain JSON"):
        Run.create(tmp_path / "run", {"tuning": tj.full()})
    assert os.listdir(tmp_path) == []


def test_opening_what_is_no_run_raises(tmp_path):
    with pytest.raises(tj.CheckpointError, match=r"is no run directory: 'config.json' cannot be read"):
        Run.open(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(tj.CheckpointError, match="is damaged: it is no JSON"):
        Run.open(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(tj.CheckpointError, match="expected a JSON object"):
        Run.open(tmp_path)


def test_an_unreadable_plan_raises(run):
    (run.path / "plan.json").mkdir()
    with pytest.raises(tj.CheckpointError, match=r"plan.json' cannot be read"):
        _ = run.plan


# Metrics --------------------------------------------------------------------------------------------------------------


def test_metrics_come_back_in_order_and_merged_by_step(run):
    run.log(1, {"loss": jnp.array(0.5), "finite": True})
    run.log(2, {"loss": np.float32(0.25), "accuracy": jnp.array(0.5, jnp.bfloat16)})
    run.log(2, {"validation/accuracy": float("nan"), "note": "x", "skipped": None})
    assert run.metrics() == [
        {"step": 1, "loss": 0.5, "finite": True},
        {"step": 2, "loss": 0.25, "accuracy": 0.5, "validation/accuracy": None, "note": "x", "skipped": None},
    ]


@pytest.mark.parametrize("tail", [b"{", b'{"step": 2, "loss"', b"x" * 10_000])
def test_a_line_that_a_kill_cut_off_is_dropped_and_written_over(run, tail):
    run.log(1, {"loss": 1.0})
    with open(run.path / "metrics.jsonl", "ab") as file:
        file.write(tail)
    assert run.metrics() == [{"step": 1, "loss": 1.0}]
    run.log(2, {"loss": 0.5})
    assert run.metrics() == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]


def test_a_first_line_that_was_cut_off_leaves_nothing(run):
    (run.path / "metrics.jsonl").write_bytes(b'{"st')
    run.log(1, {"loss": 1.0})
    assert run.metrics() == [{"step": 1, "loss": 1.0}]


def test_restoring_drops_what_was_logged_after_the_checkpoint(run):
    state, _ = start()
    run.save(state, "base")
    run.log(0, {"loss": 2.0})
    run.log(1, {"loss": 1.0})
    assert run.read(state, "base") and len(run.metrics()) == 2
    run.restore(state, "base")
    assert run.metrics() == [{"step": 0, "loss": 2.0}]


@pytest.mark.parametrize("line", [b"nonsense\n", b"[1]\n", b'{"loss": 1}\n'])
def test_a_damaged_line_in_the_middle_raises(run, line):
    (run.path / "metrics.jsonl").write_bytes(line + b'{"step": 1}\n')
    with pytest.raises(tj.CheckpointError, match="is damaged: expected one JSON object"):
        run.metrics()


def test_metrics_that_cannot_be_read_raise(run):
    (run.path / "metrics.jsonl").mkdir()
    with pytest.raises(tj.CheckpointError, match=r"metrics.jsonl' cannot be read"):
        run.metrics()


def test_only_scalars_are_logged(run):
    with pytest.raises(tj.CheckpointError, match=r"metric 'loss' is \(2,\) float32; expected a scalar"):
        run.log(1, {"loss": jnp.zeros(2)})


# Reports and figures --------------------------------------------------------------------------------------------------


def test_reports_and_figures_are_written(run):
    class Figure:
        def savefig(self, file, format):
            file.write(f"a {format}".encode())

    assert run.write_report(tj.Report("Result", ("accuracy",), ((0.5,),))).read_text().startswith("### Result")
    assert run.write_figure(Figure()).read_bytes() == b"a png"
    assert run.write_figure(Figure(), "table.svg").read_bytes() == b"a svg"


def test_a_run_made_by_hand_takes_any_path(tmp_path):
    assert Run(str(tmp_path), {}).metrics() == [] and Run(str(tmp_path), {}).path == tmp_path
    with pytest.raises(
        tj.CheckpointError, match=r"Run\(\) expects the path of a file or directory, got dict: write Run"
    ):
        Run({}, tmp_path)
    with pytest.raises(tj.CheckpointError, match=r"Run.open\(\) expects the path of a file or directory, got NoneType"):
        Run.open(None)


def test_something_else_as_the_plan_of_a_run(tmp_path):
    with pytest.raises(tj.CheckpointError, match=r"Run.create\(\) expects a surgery Plan or None third, got dict"):
        Run.create(tmp_path / "run", {}, {})


# Full and read-only disks ---------------------------------------------------------------------------------------------


@pytest.fixture
def small_files():
    """No file may grow beyond 20 kB: writing fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, old)


def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_half_written(run, request):
    make = lambda step: tj.FinetuneState(jnp.array(step), jax.random.key(0), {"a": jnp.arange(50_000.0)}, {}, ())
    run.save(make(1), "base")
    request.getfixturevalue("small_files")
    with pytest.raises(tj.CheckpointError, match="cannot write the checkpoint"):
        run.save(make(2), "base")
    assert os.listdir(run.path / "checkpoints") == ["1"]
    same_bits(run.restore(make(0), "base")[0], make(1))


def test_a_full_disk_leaves_the_old_file(tmp_path, small_files):
    write_bytes(tmp_path / "note", b"old")
    with pytest.raises(tj.CheckpointError, match=r"cannot write '.*note': .*Expected a writable directory"):
        write_bytes(tmp_path / "note", b"x" * 50_000)
    assert (tmp_path / "note").read_bytes() == b"old" and os.listdir(tmp_path) == ["note"]


def test_a_full_disk_leaves_whole_lines_in_the_metrics(run, small_files):
    with pytest.raises(tj.CheckpointError, match=r"cannot write '.*metrics.jsonl'"):
        for step in range(10_000):
            run.log(step, {"loss": 1.0})
    assert [line["loss"] for line in run.metrics()] == [1.0] * len(run.metrics())
    assert (run.path / "metrics.jsonl").read_bytes().endswith(b"\n")


def test_a_place_that_cannot_be_written_raises(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(tj.CheckpointError, match=r"cannot write '.*file/run'"):
        Run.create(tmp_path / "file/run", {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_directory_raises(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(tj.CheckpointError, match="Permission denied"):
        Run.create(tmp_path / "run", {})


# Fingerprints ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        {"a": np.ones(4), "b": np.zeros(2)},
        {"a": np.ones((2, 2), np.float32), "b": np.zeros(2)},
        {"a": np.ones((2, 2)), "c": np.zeros(2)},
        {"a": np.ones((2, 2)), "b": np.array([0.0, -0.0])},
        {"a": np.ones((2, 2)), "b": tj.Hole()},
    ],
)
def test_any_change_changes_the_fingerprint(other):
    assert fingerprint({"a": np.ones((2, 2)), "b": np.zeros(2)}) != fingerprint(other)


@pytest.mark.parametrize("format", ["orbax", "safetensors", "npz", "msgpack"])
def test_the_fingerprint_is_that_of_the_saved_checkpoint(tmp_path, format):
    tree = {"a": [np.ones((2, 2), np.float32), 3], "b": {"key": jax.random.key(0), "half": jnp.ones(2, jnp.bfloat16)}}
    tj.io.save(tmp_path / "w", tree, format=format)
    checkpoint = tj.io.open(tmp_path / "w", digest=fingerprint(tree))
    assert fingerprint(tree) == checkpoint.fingerprint() and len(fingerprint(tree)) == 64


def test_the_fingerprint_of_a_model_is_that_of_its_params_and_extra():
    model = tj.Model(None, None, {"bn": {"scale": np.ones(2)}}, {"bn": {"mean": np.zeros(2)}})
    assert fingerprint(model) == fingerprint({"bn": {"scale": np.ones(2), "mean": np.zeros(2)}})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ("w.npz", r"fingerprint\(\) is of a tree in memory, and got a path. Of a file write transferjax.io.open"),
        (pathlib.Path("w.npz"), "is of a tree in memory, and got a path"),
        (None, r"fingerprint\(\) expects a tree of arrays, got NoneType without a leaf"),
        ({}, "expects a tree of arrays, got dict without a leaf"),
        ({"a": "text"}, "'a' is str. Expected an array or a number"),
        (print, "is builtin_function_or_method. Expected an array or a number"),
    ],
)
def test_what_holds_no_array_has_no_fingerprint(tree, message):
    with pytest.raises(tj.CheckpointError, match=message):
        fingerprint(tree)


def test_a_tree_of_holes_has_a_fingerprint():
    assert fingerprint({"a": tj.Hole()}) == fingerprint(tj.Hole())


def test_the_fingerprint_does_not_depend_on_memory_layout():
    array = np.arange(6.0).reshape(2, 3)
    assert fingerprint(array) == fingerprint(np.asfortranarray(array)) == fingerprint(array.copy()[:, :])


def test_arrays_of_other_processes_have_no_fingerprint(monkeypatch):
    array = jnp.ones(2)
    monkeypatch.setattr(type(array), "is_fully_addressable", property(lambda self: False))
    with pytest.raises(tj.CheckpointError, match=r"'a' \(2,\) float32 lies on several processes. Gather it first"):
        fingerprint({"a": array})


# A real kill ----------------------------------------------------------------------------------------------------------

CHILD = """
import importlib.util, os, pathlib, signal, sys
spec = importlib.util.spec_from_file_location("helpers", sys.argv[1])
helpers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helpers)
helpers.child(pathlib.Path(sys.argv[2]), int(sys.argv[3]))
"""


def child(path, kill_at, steps=6):
    """Trains to the end, saving and logging each step; kills itself in the middle of the save of step ``kill_at``."""
    from transferjax.io import _beside

    first, frozen = start("head+lora")
    base, begin = fingerprint(frozen), 0
    if (path / "config.json").exists():
        run = Run.open(path)
        first, begin = run.restore(first, base, 0)
    else:
        run = Run.create(path, {"seed": 0})
    for state, metrics in tj.fit(make_step("head+lora"), first, frozen, make_batches(begin, steps)):
        step = int(state.step)
        run.log(step, metrics)
        if step == kill_at:
            with open(run.path / "metrics.jsonl", "ab") as file:
                file.write(b'{"step": ')
            _beside._take_place = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
        run.save(state, base, step)
        if step == steps:
            print(fingerprint(state))


def test_a_run_that_was_killed_ends_with_the_same_bits_and_the_same_log(tmp_path):
    def launch(path, kill_at):
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(CHILD), __file__, str(path), str(kill_at)],
            capture_output=True,
            text=True,
            cwd=pathlib.Path(tj.__file__).parents[1],
        )

    whole = launch(tmp_path / "whole", -1)
    assert whole.returncode == 0, whole.stderr
    killed = launch(tmp_path / "killed", 4)
    assert killed.returncode == -signal.SIGKILL and Run.open(tmp_path / "killed").latest == 3
    resumed = launch(tmp_path / "killed", -1)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout == whole.stdout != ""
    assert (tmp_path / "killed/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
