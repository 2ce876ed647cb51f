"""The program on the README's first screen runs as printed, on fewer images."""

import pathlib
import re

import jax

README = (pathlib.Path(__file__).parents[2] / "README.md").read_text()


def test_the_main_job_runs_as_printed(capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    short = code.replace('tj.data.open("sample", "train")', 'tj.data.open("sample", "train[:64]")')
    assert short != code
    names = {}
    exec(compile(short.replace("epochs=5", "epochs=1").replace("size=64", "size=32"), "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "Plan: 296 sources -> 247 targets" in printed and "Cost of one step" in printed
    assert int(names["state"].step) == 2
    same = jax.tree.map(lambda a, b: bool((a == b).all()), names["model"].params["stem"], names["tuned"].params["stem"])
    assert all(jax.tree.leaves(same))


def test_the_two_commands_are_there():
    commands = re.findall(r"^pip install .*&& .*$", README, re.MULTILINE)
    assert len(commands) == 2
    assert commands[0].endswith("&& transferjax demo") and commands[1].endswith("&& pytest -n auto")
