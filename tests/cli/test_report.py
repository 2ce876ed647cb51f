"""report: what moved between two files, and whether what was frozen did not."""

import json
import os
import pathlib

import numpy as np
import pytest

import transferjax as tj
from transferjax.cli import main

TORCH = str(pathlib.Path(__file__).parent.parent / "fixtures" / "torch" / "nested.pth")  # a kernel of (4, 3, 3, 3)


@pytest.fixture
def tuned(bases):
    """The first file of weights with another head, and one bias more."""
    arrays = dict(np.load(bases[0]))
    arrays["head/fc/kernel"] = 1.5 * arrays["head/fc/kernel"]
    tj.io.save("tuned.safetensors", tj.tree.nest({**arrays, "new": np.zeros(2)}), format="safetensors")
    return "tuned.safetensors"


def test_what_moved_is_listed(bases, tuned, capsys):
    assert main(["report", bases[0], tuned, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row[:2] for row in report["rows"]] == [["head/fc/kernel", "moved"], ["new", "only in tuned"]]
    found = dict(zip(report["columns"], report["rows"][0]))
    assert found["relative change"] == pytest.approx(0.5) and found["effective rank"] > 1
    assert report["metadata"]["only in tuned"] == 1
    assert report["title"] == f"{bases[0]} to {tuned}: Movement: 1 of 3 leaves moved"
    assert main(["report", bases[0], tuned, "--all", "--axis", "none"]) == 0
    out = capsys.readouterr().out
    assert "stem/kernel     equal" in out and "share of leaves moved: 0.3333" in out


def test_a_frozen_array_that_moved_ends_with_1(bases, tuned, capsys):
    assert main(["report", bases[0], tuned, "--frozen", "stem/*"]) == 0
    assert "frozen leaves that moved: 0" in capsys.readouterr().out
    assert main(["report", bases[0], tuned, "--frozen", "*/fc/*"]) == 1
    captured = capsys.readouterr()
    assert "moved!" in captured.out and "frozen leaves that moved: 1" in captured.out
    assert captured.err == "transferjax report: not as frozen as --frozen */fc/* says: head/fc/kernel\n"


def test_a_directory_has_all_arrays_and_a_picture(bases, tuned, workplace, capsys):
    before = set(os.listdir())
    assert main(["report", bases[0], tuned, "--output", "moved/out"]) == 0
    assert sorted(os.listdir("moved/out")) == ["movement.png", "report.md"] and set(os.listdir()) == before | {"moved"}
    assert "| stem/kernel | equal |" in (workplace / "moved" / "out" / "report.md").read_text()
    assert main(["report", bases[0], tuned, "--output", "moved/out"]) == 1
    assert "--output 'moved/out' exists already. Expected a new directory." in capsys.readouterr().err


def test_two_checkpoints_of_a_run(finetune, capsys):
    assert finetune() == 0
    capsys.readouterr()
    assert main(["report", "run/checkpoints/3", "run", "--json"]) == 0
    rows = {row[0]: row[1] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["trainable/head/head/fc/kernel"] == "moved"


def test_what_has_no_array_in_common_is_said(bases, capsys):
    np.savez("other.npz", **{"heda/fc/kernel": np.zeros(2)})
    assert main(["report", bases[0], "other.npz"]) == 1
    error = capsys.readouterr().err
    assert "found no leaf in both" in error and "Nearest: head/fc/kernel" in error and error.count("\n") == 1
    assert main(["report", bases[0], "base7.npz"]) == 1
    assert "there is nothing at" in capsys.readouterr().err


@pytest.mark.parametrize("axis", ["first", "last"])
def test_outputs_are_the_first_axis_of_kernels_in_a_file_of_torch(axis, workplace, capsys):
    arrays = {path: np.asarray(array) for path, array in tj.io.open(TORCH).items()}
    kernel = arrays["state_dict.0.weight"]
    change = np.random.default_rng(0).normal(size=kernel.shape).astype(kernel.dtype)
    np.savez("tuned.npz", **{**arrays, "state_dict.0.weight": kernel + change})
    options = [] if axis == "first" else ["--axis", "last"]
    assert main(["report", TORCH, "tuned.npz", "--json", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = change.reshape(4, 27) if axis == "first" else change.reshape(36, 3)
    shares = np.linalg.svd(rows, compute_uv=False) ** 2 / np.square(rows).sum()
    place = found["columns"].index("effective rank")
    assert [row[0] for row in found["rows"]] == ["state_dict.0.weight"]
    assert found["rows"][0][place] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
