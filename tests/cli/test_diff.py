"""diff: what tells two files apart."""

import json

import numpy as np

import transferjax as tj
from transferjax.cli import main


def test_only_what_differs_is_listed(bases, capsys):
    arrays = dict(np.load(bases[0]))
    tj.io.save("other", tj.tree.nest({**arrays, "head/fc/bias": arrays["head/fc/bias"] + 3, "new": np.zeros(2)}))
    assert main(["diff", bases[0], "other", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row[:2] for row in report["rows"]] == [["head/fc/bias", "values"], ["new", "only in b"]]
    assert report["rows"][0][6] == 3.0
    assert report["metadata"] == {"equal": False, "equal leaves": 2, "only in b": 1, "values": 1}
    assert main(["diff", bases[0], "other", "--all"]) == 0
    assert "stem/kernel     equal" in capsys.readouterr().out


def test_headers_only(bases, capsys):
    assert main(["diff", *bases, "--shapes-only", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] == [] and report["metadata"] == {"equal": False, "same form": 3}


def test_two_checkpoints_of_a_run(finetune, capsys):
    assert finetune() == 0
    capsys.readouterr()
    assert main(["diff", "run/checkpoints/3", "run", "--json"]) == 0
    rows = {row[0]: row[1] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["trainable/head/head/fc/kernel"] == "values"


def test_a_missing_file_is_named(bases, capsys):
    assert main(["diff", bases[0], "base7.npz"]) == 1
    assert "there is nothing at" in capsys.readouterr().err
