"""Advice: what is ranked first, what it costs, what it cites, and what is refused."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax import DataError
from transferjax.advise import Budget, Candidate, Evidence, advise, describe_task, rank
from transferjax.advise._notes import notes as make_notes
from transferjax.features import FeatureTable, ridge

LABELS = np.arange(80) % 4


def table(signal, ids=range(80), width=8, seed=0):
    """Features that tell the classes more or less."""
    x = np.random.default_rng(seed).normal(size=(80, width))
    x[:, :4] += signal * np.eye(4)[LABELS]
    return FeatureTable({"outputs": x.astype(np.float32)}, np.array(ids), LABELS)


@pytest.fixture
def candidates():
    costs = {"full": 0.01, "last 4": 0.002}
    return {"good": Candidate(table(3), 10**6, costs), "weak": Candidate(table(1.2), 10**6)}


def test_the_better_source_comes_first_and_the_inputs_are_always_there(candidates, evidence):
    found = advise(candidates, table(0.5), 0, evidence=evidence)
    assert [line.source for line in found.lines] == ["good", "weak", "raw"]
    assert all(line.road == "features" and line.steps == 0 and line.seconds == 0 for line in found.lines)
    assert found.transfer_helps and "Transfer is expected to gain" in found.notes[0]


def test_with_steps_the_way_that_was_best_elsewhere_is_first(candidates, evidence):
    found = advise(candidates, table(0.5), Budget(128, 16), evidence=evidence)
    first = found.lines[0]
    assert (first.source, first.tuning, first.optimizer, first.learning_rate) == ("good", "full", "adamw", 1e-3)
    assert first.steps == 128 and first.epochs == 128 * 16 / 80 and first.seconds == pytest.approx(0.01 * 16 * 128)
    assert {line.source for line in found.lines} == {"good", "weak", "raw", "none"}
    assert [line.expected for line in found.lines] == sorted((line.expected for line in found.lines), reverse=True)


def test_what_is_expected_is_the_probe_moved_as_elsewhere(candidates, evidence, ways):
    found = advise(candidates, table(0.5), 128, evidence=evidence)
    probes = {task.source: task.probe for task in found.tasks}
    for line in found.lines:
        start = probes["raw" if line.source == "none" else line.source]
        ratio = next(
            ratio
            for (source, _, tuning, features, optimizer, steps), ratio in ways.items()
            if (tuning, features, optimizer) == (line.tuning, line.features, line.optimizer)
            and steps == line.steps
            and (source == "none") == (line.source == "none")
        )
        assert 1 - line.expected == pytest.approx((1 - start) * ratio, abs=0.03)
        assert line.low - 1e-9 <= line.expected <= line.high + 1e-9


def test_every_line_cites_runs_of_its_own_kind(candidates, evidence):
    runs = {run.name: run for run in evidence.runs}
    for line in advise(candidates, table(0.5), 32, evidence=evidence).lines:
        assert line.evidence
        for name in line.evidence:
            assert (runs[name].road, runs[name].tuning, runs[name].optimizer) == (
                line.road,
                line.tuning,
                line.optimizer,
            )


def test_seconds_leave_out_what_is_known_to_take_longer(candidates, evidence):
    found = advise(candidates, table(0.5), Budget(128, 32, seconds=1), evidence=evidence)
    assert {line.road for line in found.lines} == {"features"}  # and what is not known to fit
    found = advise(candidates, table(0.5), Budget(128, 32, seconds=50), evidence=evidence)
    assert {line.source for line in found.lines if line.road == "finetune"} == {"good"}


def test_where_the_inputs_are_as_good_it_says_that_transfer_does_not_help(evidence):
    found = advise({"noise": Candidate(table(0.0), 10**6)}, table(3), 0, evidence=evidence)
    assert not found.transfer_helps and found.lines[0].source == "raw"
    assert found.notes[0].startswith("Transfer is not expected to help: a linear model on the inputs comes first")


def test_thin_evidence_scores_that_disagree_and_more_labels_are_noted(candidates, world, ways):
    known = world((0.66,), {way: ratio for way, ratio in ways.items() if way[0] != "none"})
    far = Evidence(known.runs, tuple(dataclasses.replace(task, labels=10_000) for task in known.tasks))
    found = advise(candidates, table(0.5), 0, evidence=far)
    assert any(note.startswith("Thin evidence: the first line's weighs") for note in found.notes)
    tasks = [
        dataclasses.replace(task, half=task.probe - 0.05, logme=float(place), knn_accuracy=-float(place))
        for place, task in enumerate(found.tasks)
    ]
    notes = " ".join(make_notes(found.lines, tuple(tasks), world(), Budget(0)))
    assert "The scores do not agree on the best source (logme: weak, gbc: good, knn_accuracy: raw)." in notes
    assert "More labels would help: the second half of yours gave the probe of good 5.0 points" in notes


def test_published_figures_are_marked_as_such(candidates, world):
    known = world() + Evidence((), (), tj.advise.evidence().published)
    notes = advise(candidates, table(0.5), 128, evidence=known).notes
    assert any(note.startswith("Published, not measured here (P1): ResNet-50") for note in notes)


def test_models_are_looked_at_in_one_pass_and_features_are_put_in_order(evidence):
    x = np.array(table(2)["outputs"])
    batches = [
        {"inputs": x[n : n + 20], "labels": LABELS[n : n + 20], "id": np.arange(n, n + 20)} for n in range(0, 80, 20)
    ]
    model = tj.interop.pure(lambda params, x: x @ params["kernel"], {"kernel": jnp.eye(8)})
    turned = table(2).take(np.arange(80)[::-1])
    evidence = Evidence(evidence.runs, tuple(dataclasses.replace(task, parameters=64) for task in evidence.tasks))
    found = advise({"model": model, "turned": Candidate(turned, 64)}, batches, 32, evidence=evidence)
    one, other = (next(task for task in found.tasks if task.source == name) for name in ("model", "turned"))
    assert one.probe == other.probe and one.parameters == other.parameters == 64
    assert any(line.seconds for line in found.lines if line.source == "model" and line.steps)


def test_texts_are_compared_with_their_tokens(evidence):
    tokens = np.random.default_rng(0).integers(4, 50, (80, 6))
    tokens[:, 0] = LABELS
    batches = [{"inputs": {"input_ids": tokens}, "labels": LABELS, "id": np.arange(80)}]
    found = advise({"good": Candidate(table(3), 10**6)}, batches, 0, evidence=evidence)
    assert found.tasks[0].modality == "text" and found.tasks[0].width == 2048 and found.tasks[0].probe > 0.9
    facts = dict(found.data.rows)
    assert facts["tokens per text"] == pytest.approx(6) and 5 < facts["distinct tokens per text"] <= 6


def test_the_reports_hold_what_the_advice_does(candidates, evidence):
    found = advise(candidates, table(0.5), 32, evidence=evidence)
    report = found.report()
    assert str(found) == str(report) and len(report.rows) == len(found.lines)
    assert report.column("evidence")[0] == ", ".join(found.lines[0].evidence)
    assert [report.metadata[f"note {number}"] for number in range(1, len(found.notes) + 1)] == list(found.notes)
    assert set(found.cited().column("name")) == {name for line in found.lines for name in line.evidence}
    sources = found.sources()
    assert sources.column("source")[0] == "good" and sources.column("mean rank")[0] == 1
    assert dict(found.data.rows)["examples of the smallest class"] == 20 and dict(found.data.rows)["examples"] == 80
    assert found.curves().columns == ("source", "20", "40", "80")
    assert found.curves().column("80") == [task.probe for task in found.tasks]


def test_rank_is_the_advice_without_looking(candidates, evidence):
    found = advise(candidates, table(0.5), 32, evidence=evidence)
    costs = {name: one.step_seconds for name, one in candidates.items()}
    assert rank(found.tasks, Budget(32), evidence, costs) == found.lines


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_candidates_and_of_evidence_does_not_matter(candidates, evidence, seed):
    mixed = np.random.default_rng(seed).permutation(len(evidence.runs))
    other = Evidence(tuple(evidence.runs[n] for n in mixed), evidence.tasks)
    turned = dict(reversed(candidates.items()))
    one, two = (
        advise(given, table(0.5), 32, evidence=known) for given, known in ((candidates, evidence), (turned, other))
    )
    strip = lambda line: (line.source, line.road, line.tuning, line.optimizer, round(line.expected, 9))
    assert sorted(map(strip, one.lines)) == sorted(map(strip, two.lines))
    assert strip(one.lines[0]) == strip(two.lines[0])


def test_what_cannot_be_advised_on_raises(candidates, evidence):
    ask = lambda given=candidates, data=None, **more: advise(
        given, table(0.5) if data is None else data, 0, evidence=evidence, **more
    )
    with pytest.raises(DataError, match=r"candidates are .*; expected {name: Model, Candidate or FeatureTable}"):
        ask({})
    with pytest.raises(DataError, match=r"a candidate is called 'raw', which stands for the inputs themselves"):
        ask({"raw": table(1)})
    with pytest.raises(DataError, match=r"candidate 'net' is .*; expected Model, Candidate or FeatureTable"):
        ask({"net": np.ones((80, 3))})
    with pytest.raises(DataError, match=r"at or caches name other, which is no candidate: good, weak"):
        ask(at={"other": "blocks/*"})
    model = tj.interop.pure(lambda params, x: x, {"kernel": jnp.eye(8)})
    with pytest.raises(DataError, match=r"candidate 'net' is a Model, and the data set is a table of features"):
        ask({"net": model})
    with pytest.raises(DataError, match=r"which cannot be gone over more than once"):
        ask(data=iter([]))
    with pytest.raises(DataError, match=r"'half' has 40 of the data set's 80 examples. Expected features of all"):
        ask({"half": table(1).take(np.arange(40))})
    with pytest.raises(DataError, match=r"no example is in both tables"):
        ask({"other": table(1, ids=range(1000, 1080))})
    with pytest.raises(DataError, match=r"evidence is .*; expected Evidence, as evidence\(\) and open_local"):
        advise(candidates, table(0.5), 0, evidence="mine")
    with pytest.raises(DataError, match=r"at is .*; expected a dict by candidate, {'good': ...}"):
        ask(at="blocks/*")
    with pytest.raises(DataError, match=r"'net' has other labels than the data set. Expected features of the same"):
        ask({"net": FeatureTable(table(1).arrays, np.arange(80), LABELS[::-1])})
    bad = table(1)["outputs"].copy()
    bad[3] = np.nan
    with pytest.raises(DataError, match=r"'net' has features 'outputs' that are not finite, of the example 3"):
        ask({"net": FeatureTable({"outputs": bad}, np.arange(80))})


def test_without_evidence_the_inputs_are_still_a_line_and_what_nothing_speaks_of_is_named(candidates):
    found = advise(candidates, table(0.5), 32, evidence=Evidence((), ()))
    [line] = found.lines
    assert (line.source, line.weight, line.evidence) == ("raw", 0, ()) and line.expected == found.tasks[0].probe
    assert "No evidence speaks of 'good': its probe alone" in " ".join(found.notes)
    assert not any(note.startswith("Transfer is not expected") for note in found.notes)
    with pytest.raises(DataError, match=r"the evidence says nothing of such a task within the budget"):
        rank((), Budget(0), Evidence((), ()))


@pytest.mark.parametrize("parameters", [None, 160, 10**9])
def test_a_candidate_of_unknown_or_uncommon_size_is_not_lost(candidates, evidence, parameters):
    given = {"net": Candidate(candidates["good"].features, parameters)}
    found = advise(given, table(0.5), 32, evidence=evidence)
    assert found.lines[0].source == "net" and len([line for line in found.lines if line.source == "net"]) == 3


def test_fewer_steps_than_any_run_had_leave_features_and_a_note(candidates, evidence):
    found = advise(candidates, table(0.5), 8, evidence=evidence)
    assert {line.road for line in found.lines} == {"features"}
    assert any("No run in the evidence has fewer than 32 steps" in note for note in found.notes)
    more = advise(candidates, table(0.5), 512, evidence=evidence)
    assert any("No run in the evidence has more than 128 steps" in note for note in more.notes)
    assert more.lines[0].steps == 512 and more.lines[0].road == "finetune"


def test_the_rate_is_that_of_the_best_run(candidates, evidence):
    worse = [
        dataclasses.replace(run, rate=1.0, accuracy=0.1, name=f"worse {n}")
        for n, run in enumerate(evidence.runs)
        if run.optimizer == "adamw"
    ]
    known = Evidence((*worse, *worse, *evidence.runs), evidence.tasks)
    one, other = (advise(candidates, table(0.5), 128, evidence=given).lines[0] for given in (evidence, known))
    assert other == one and other.learning_rate == 1e-3


def test_all_layers_that_were_not_looked_at_are_left_out_of_the_evidence_too(candidates, evidence):
    known = Evidence(
        evidence.runs,
        tuple(
            task if task.source == "raw" else dataclasses.replace(task, layers=task.probe + 0.04)
            for task in evidence.tasks
        ),
    )
    one, other = (advise(candidates, table(0.5), 128, evidence=given) for given in (evidence, known))
    assert [line.expected for line in one.lines] == [line.expected for line in other.lines]


def test_strategies_of_texts_are_not_for_images(candidates, evidence):
    texts = [dataclasses.replace(run, target="texts", tuning="last 3", name="T1") for run in evidence.runs[:8]]
    tasks = [dataclasses.replace(task, target="texts", modality="text") for task in evidence.tasks[:4]]
    known = evidence + Evidence(tuple(texts), tuple(tasks))
    assert all(line.tuning != "last 3" for line in advise(candidates, table(0.5), 128, evidence=known).lines)
    odd = advise(candidates, table(0.5), 128, evidence=known, modality="sound")
    assert any("There is no evidence of the modality 'sound'" in note for note in odd.notes)


def test_runs_of_data_that_was_never_looked_at_are_counted(candidates, evidence):
    lost = dataclasses.replace(evidence.runs[0], target="elsewhere")
    found = advise(candidates, table(0.5), 0, evidence=evidence + Evidence((lost,), ()))
    assert any(note.startswith("1 runs are of data that `transferjax probe --evidence`") for note in found.notes)


def test_what_cannot_be_described_raises():
    good = {"net": Candidate(table(1))}
    with pytest.raises(DataError, match=r"labels are .*; expected classes, integers \[N\]"):
        describe_task(good, np.zeros((80, 3)))
    with pytest.raises(DataError, match=r"the data set has 80 examples of 1 classes. Expected at least 8 examples"):
        describe_task(good, np.zeros(80, int))
    with pytest.raises(DataError, match=r"'net' has features of 80 examples, and there are 60 labels"):
        describe_task(good, LABELS[:60])


def test_noise_is_worth_no_less_than_the_largest_class():
    labels = np.array([0] * 50 + [1] * 30)
    for seed in range(5):
        x = np.random.default_rng(seed).normal(size=(80, 3))
        [task] = describe_task({"net": Candidate(FeatureTable({"outputs": x}, np.arange(80)))}, labels)
        assert task.probe >= 50 / 80


def test_labels_that_skip_values_and_a_class_with_one_example_are_described():
    labels = np.where(LABELS == 3, 90, LABELS)
    labels[0] = 7
    layers = FeatureTable({"early": table(2)["outputs"], "outputs": table(1)["outputs"]}, np.arange(80))
    [task] = describe_task({"net": Candidate(layers)}, labels)
    assert task.classes == 5 and task.layers is None and 0 < task.probe < 1


def test_all_layers_are_looked_at_where_there_are_several():
    layers = FeatureTable({"early": table(4)["outputs"], "outputs": table(0.3)["outputs"]}, np.arange(80))
    [task] = describe_task({"net": Candidate(layers)}, LABELS)
    assert task.layers > task.probe + 0.1


def test_the_learning_curve_is_the_probe_of_parts():
    [task] = describe_task({"net": Candidate(table(2))}, LABELS)
    left_out = [row[-2] for row in ridge(table(2)["outputs"], LABELS).report.rows if row[-1]]
    assert [task.probe] == left_out and 0.5 < task.quarter < 1 and 0.5 < task.half < 1
    [small] = describe_task({"net": Candidate(table(2).take(np.arange(8)))}, LABELS[:8])
    assert small.quarter is None  # two examples tell nothing
