"""The command line as a whole: exit codes, help, and errors in one line."""

import subprocess
import sys

import pytest

from transferjax.cli import VERBS, main


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example(verb, capsys):
    assert main([verb, "--help"]) == 0
    assert f"example:\n  transferjax {verb}" in capsys.readouterr().out


def test_help_lists_every_verb(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"    {verb} " in text for verb in VERBS)


def test_the_version_is_printed(capsys):
    import transferjax

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"transferjax {transferjax.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: VERB"),
        (["fly"], "invalid choice: 'fly'"),
        (["fintune"], "Nearest: finetune."),
        (["finetune"], "the following arguments are required: --output"),
        (["finetune", "--output", "x", "--epochs", "0"], "expected a whole number of at least 1, got '0'"),
        (["finetune", "--output", "x", "--seed", "x"], "expected a whole number of at least 0, got 'x'"),
        (["finetune", "--output", "x", "--label-smoothing", "1"], "expected a number from 0 up to 1, got '1'"),
        (["finetune", "--output", "x", "--tuning", "heda"], "'heda' in 'heda' is no tuning; expected head"),
        (["finetune", "--output", "x", "--learning-rate", "fast"], "'fast' is no learning rate"),
        (["finetune", "--output", "x", "--augment", "flop"], "no augmentation is called 'flop'; expected flip"),
    ],
)
def test_arguments_that_make_no_sense_end_with_2(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_errors_are_one_line_without_a_traceback(capsys):
    assert main(["inspect", "/nowhere/weights.pth"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("transferjax inspect: there is nothing at '/nowhere/weights.pth'")
    assert captured.err.count("\n") == 1


def test_an_interruption_ends_with_130(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("transferjax.io.open", interrupted)
    assert main(["inspect", "x"]) == 130
    assert capsys.readouterr().err == "transferjax inspect: interrupted.\n"


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from transferjax.cli import main; main(['--help']); "
        "heavy = ('flax', 'orbax', 'grain', 'tensorflow_datasets', 'matplotlib', 'rich'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_the_package_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "transferjax", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("transferjax ")
    done = subprocess.run([sys.executable, "-m", "transferjax", "inspect", "/nowhere"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("transferjax inspect: there is nothing at")


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    import numpy as np

    np.savez(tmp_path / "many.npz", **{f"array{n}": np.zeros(1) for n in range(3000)})
    command = f"'{sys.executable}' -m transferjax inspect '{tmp_path / 'many.npz'}' --json | head -c 10"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("{") and done.stderr == ""
