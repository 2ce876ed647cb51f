"""How the command line words the library's errors: in its own options, and no longer than a screen."""

from __future__ import annotations

import re

LIMIT = 12
"""Problems told in full."""
OPTIONS = {
    r"pass on_error='skip' to batches to go on without such examples": "write --on-error skip to go on without them",
    r"Use a smaller batch, or drop_remainder=False for evaluation": "Use a smaller --batch-size",
    r"Pass size=\(height, width\), or preprocess=model\.preprocess": "Give --size PIXELS",
    r"give the path of a weight file: load\('.*?', weights=PATH\)": "give --weights PATH",
    r"Resume it, or choose another directory": "Go on with --resume, or choose another --output",
    r"Expected the same key in transferjax\.init\(key, \.\.\.\)": "Expected the same --seed",
    r"Build them with the same fingerprint": (
        "The images are not those that the run was started with, or damaged ones among them are left out now: "
        "bring them back, or start a new run in another --output"
    ),
    r"Pass another file, the rules of its convention": "Give another file, the --convention that it follows",
    r"(transferjax\.|tj\.)?surgery\.align\([^)]*\)": "--align",
    r"Read it with Plan\.from_json\(text\), and open": "Give",
    r"Run\.create \(or (`transferjax finetune --output`)\)": r"\1",
    r"pass overwrite=True": "add --overwrite",
    r"Leave leaves out, plan\.inverse\(leave_out=\.\.\.\), or say how they are made, .*": (
        "Leave leaves out: --leave-out GLOB."
    ),
    r"inverse\(leave_out=('[^']*'|.*?)\) selects": r"--leave-out \1 selects",
    r"Pass what you know as align\(\.\.\., rules=\(\.\.\.\)\), or .*": (
        "Write what you know into a file of rules: --rules FILE."
    ),
    r"Expected equal ones: give all trees those of one, or leave the leaf out": "Leave it out: --leave-out GLOB",
    r"\balign\(\) ": "--align ",
    r"Write layout='torch' \(transposed\) or layout='same' \(kept\)": (
        "Add --layout torch (transposed) or --layout same (kept)"
    ),
    r"Write layout=\.\.\.": "Add --layout torch or --layout same",
    r"free the plan with plan\.with_source\(None\)": "make the plan again without --bind",
    r"Leave format out": "Leave --format out",
    r"\bformat='(\w+)'": r"--format \1",
}
"""What the library says to write in Python, and what to write here."""
_SEVERAL = re.compile(r"^the plan has ([\d,]+) problems:$")


def told(text: str) -> str:
    """An error's text as the command line prints it.

    >>> told("a batch of 64 is larger than the data. Use a smaller batch, or drop_remainder=False for evaluation.")
    'a batch of 64 is larger than the data. Use a smaller --batch-size.'
    """
    for python, option in OPTIONS.items():
        text = re.sub(python, option, text)
    return _capped([" ".join(line.split()) for line in text.strip().splitlines()])


def _capped(lines: list[str]) -> str:
    """The lines, of a list of problems the first ones only."""
    start = next((number for number, line in enumerate(lines, 1) if _SEVERAL.match(line)), None)
    if start is None or len(lines) - start <= LIMIT:
        return "\n".join(lines)
    left_out = sum(_weight(line) for line in lines[start + LIMIT :])
    return "\n".join([*lines[: start + LIMIT], f"and {left_out:,} more."])


def _weight(line: str) -> int:
    """How many problems a line stands for: its own, or those that it only counts."""
    found = re.match(r"- (\d+) more ", line)
    return int(found[1]) if found else 1
