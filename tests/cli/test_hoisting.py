"""finetune with what cannot change computed once, with a quantised base, and explain beforehand."""

import json
import os

import pytest

import transferjax as tj
from transferjax.cli import _hoisting, main


def losses(run):
    return [row["loss"] for row in tj.io.Run.open(run).metrics()]


def report_of(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_hoisting_is_chosen_where_it_pays_and_changes_nothing(finetune, capsys):
    assert finetune("--json") == 0
    facts = report_of(capsys)["metadata"]
    assert facts["computed once"].startswith("68 bytes kept of each of 12 examples") and "%" in facts["FLOPs saved"]
    assert finetune("--no-hoist", "--json", output="plain") == 0
    assert "computed once" not in report_of(capsys)["metadata"]
    assert losses("run") == pytest.approx(losses("plain"), rel=1e-5)


@pytest.mark.parametrize("options", [("--epochs", "1"), ("--tuning", "full"), ("--augment", "mixup")])
def test_where_it_does_not_pay_nothing_is_hoisted(finetune, capsys, options):
    assert finetune("--json", *options) == 0
    assert report_of(capsys)["metadata"].get("computed once", "nothing").startswith("nothing")


def test_what_does_not_fit_into_memory_goes_to_disk_and_is_removed(finetune, capsys, monkeypatch):
    monkeypatch.setattr(_hoisting, "MEMORY", 64)
    assert finetune("--json") == 0
    assert report_of(capsys)["metadata"]["computed once"].endswith("run/residuals")
    assert "residuals" not in os.listdir("run")
    assert finetune("--no-hoist", output="plain") == 0
    assert losses("run") == pytest.approx(losses("plain"), rel=1e-5)


def test_hoisting_that_is_asked_for_and_impossible_raises(finetune, capsys):
    assert finetune("--hoist", tuning="full") == 1
    error = capsys.readouterr().err
    assert "--hoist: nothing of this run can be computed once: " in error and "Leave --hoist out." in error
    assert not os.path.exists("run")


def test_a_prefix_without_weights_is_hoisted_when_asked_for(finetune, capsys):
    assert finetune("--hoist", "--augment", "mixup", "--json") == 0
    assert "computed once" in report_of(capsys)["metadata"]


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_base_is_trained_evaluated_and_resumed(finetune, capsys, kind):
    assert finetune("--quantise", kind, "--json", tuning="head+lora:2") == 0
    said = report_of(capsys)["metadata"]["quantised"]
    assert said.startswith(f"{kind}: 1 frozen matrices in ") and "largest relative error" in said
    assert main(["evaluate", "run", "--split", "train", "--json"]) == 0
    assert 0 <= dict(report_of(capsys)["rows"])["accuracy"] <= 1
    assert main(["finetune", "--resume", "--output", "run"]) == 0


def test_a_wrong_selector_is_named_when_quantising_too(finetune, capsys):
    assert finetune("--quantise", "int8", tuning="train:heda/**") == 1
    assert "selector 'heda/**' matched none of" in capsys.readouterr().err


def test_quantising_where_nothing_is_frozen_raises(finetune, capsys):
    assert finetune("--quantise", "int8", tuning="full") == 1
    assert (
        "--quantise: the tuning freezes no floating-point matrix, so there is nothing to quantise. Expected one"
        in capsys.readouterr().err
    )


def explain(*options):
    given = ["--model", "tiny:make", "--data", "folder:photos", "--batch-size", "4", "--epochs", "2"]
    return main(["explain", *given, *options])


def test_explain_says_what_a_run_would_cost(photos, capsys):
    assert explain("--json", "--tuning", "head+lora:2", "--quantise", "int8") == 0
    found = report_of(capsys)
    assert list(found) == ["cost", "hoisting", "quantisation"]
    assert dict(row[:2] for row in found["cost"]["rows"])["trainable parameters"] == 2 * (192 + 16) + 34
    assert found["quantisation"]["title"] == "Quantisation to int8"
    assert explain("--no-hoist", "--json", "--device-memory", "1GiB") == 0
    assert list(report_of(capsys)) == ["cost", "memory"]
    assert explain("--no-compile") == 0
    assert "Hoisting" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["16", "0GiB", "sixteen", "16PiB"])
def test_a_size_that_is_none_raises(photos, capsys, text):
    assert explain("--device-memory", text) == (0 if text == "16" else 2)
    if text != "16":
        assert f"'{text}' is no size; expected bytes above 0: 16GiB, 500MB" in capsys.readouterr().err
