"""The program on the README's first screen runs as printed, on fewer images."""

import pathlib
import re

import jax

README = (pathlib.Path(__file__).parents[2] / "README.md").read_text()


def test_the_programs_run_as_printed(capsys):
    """One after the other, each on what those before it left."""
    programs = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    short = programs[0].replace('tj.data.open("sample", "train")', 'tj.data.open("sample", "train[:64]")')
    assert len(programs) == 6 and short != programs[0]
    names = {}
    exec(compile(short.replace("epochs=5", "epochs=1").replace("size=64", "size=32"), "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "Plan: 296 sources -> 247 targets" in printed and "Cost of one step" in printed
    assert int(names["state"].step) == 2
    same = jax.tree.map(lambda a, b: bool((a == b).all()), names["model"].params["stem"], names["tuned"].params["stem"])
    assert all(jax.tree.leaves(same))
    exec(compile(programs[1], "README.md", "exec"), names)
    assert "FLOPs of a hoisted step" in capsys.readouterr().out
    assert int(names["state"].step) == 2 and len(names["cache"]) == 64
    exec(compile(programs[2], "README.md", "exec"), names)
    assert len(names["found"].report.rows) == 6 and set(names["found"].hyper) == {"lr", "seed"}
    assert "FinetuneState(step 2 of 6 runs" in repr(names["found"].runs)
    exec(compile(programs[3], "README.md", "exec"), names)
    assert "Head2Toe" in capsys.readouterr().out and float(names["right"].mean()) > 0.5
    exec(
        compile(programs[4].replace("train[:300]", "train[:60]").replace("size=48", "size=32"), "README.md", "exec"),
        names,
    )
    printed = capsys.readouterr().out
    exec(compile(programs[5].replace("size=28", "size=16"), "README.md", "exec"), names)
    assert "stem/conv/kernel" in capsys.readouterr().out and 0 <= float(names["metrics"]["agreement"]) <= 1
    assert "Advice for 128 steps" in printed and "Learning curves" in printed and names["advice"].lines[0].evidence


def test_the_two_commands_are_there():
    commands = re.findall(r"^pip install .*&& .*$", README, re.MULTILINE)
    assert len(commands) == 2
    assert commands[0].endswith("&& transferjax demo") and commands[1].endswith("&& pytest -n auto")
