"""Advice: what is ranked first, what it costs, what it cites, and what is refused."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax import DataError
from transferjax.advise import Budget, Candidate, Evidence, advise, describe_task, rank
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
    full = [line for line in found.lines if line.tuning == "full" and line.road == "finetune"]
    assert [line.source for line in full] == ["weak", "weak"] and full[0].seconds is None


def test_where_the_inputs_are_as_good_it_says_that_transfer_does_not_help(evidence):
    found = advise({"noise": Candidate(table(0.0), 10**6)}, table(3), 0, evidence=evidence)
    assert not found.transfer_helps and found.lines[0].source == "raw"
    assert found.notes[0].startswith("Transfer is not expected to help: closed form on the inputs comes first")


def test_thin_evidence_scores_that_disagree_and_more_labels_are_noted(candidates, world):
    large = {name: dataclasses.replace(candidate, parameters=10**7) for name, candidate in candidates.items()}
    found = advise(large, table(0.5), 0, evidence=world(errors=(0.02,)))
    assert any(note.startswith("Thin evidence: it weighs ") for note in found.notes)
    tasks = [
        dataclasses.replace(task, half=task.probe - 0.05, logme=float(place), knn_accuracy=-float(place))
        for place, task in enumerate(found.tasks)
    ]
    from transferjax.advise._advice import _notes

    notes = " ".join(_notes(found.lines, tuple(tasks), world()))
    assert "The scores do not agree on the best source" in notes
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


def test_the_reports_hold_what_the_advice_does(candidates, evidence):
    found = advise(candidates, table(0.5), 32, evidence=evidence)
    report = found.report()
    assert str(found) == str(report) and len(report.rows) == len(found.lines)
    assert report.column("evidence")[0] == ", ".join(found.lines[0].evidence)
    assert list(report.metadata.values()) == list(found.notes)
    sources = found.sources()
    assert sources.column("source")[0] == "good" and sources.column("mean rank")[0] == 1
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
    with pytest.raises(DataError, match=r"the evidence says nothing of such a task within the budget"):
        advise(candidates, table(0.5), 0, evidence=Evidence((), ()))


def test_what_cannot_be_described_raises():
    good = {"net": Candidate(table(1))}
    with pytest.raises(DataError, match=r"labels are .*; expected classes, integers \[N\]"):
        describe_task(good, np.zeros((80, 3)))
    with pytest.raises(DataError, match=r"the data set has 80 examples of 1 classes. Expected at least 8 examples"):
        describe_task(good, np.zeros(80, int))
    with pytest.raises(DataError, match=r"'net' has features of 80 examples, and there are 60 labels"):
        describe_task(good, LABELS[:60])


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
