"""Rules as JSON and as lines of Python: what a person reads, edits and commits beside a model."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterable
from typing import Any

from transferjax._errors import PlanError, nearest_hint
from transferjax.surgery import _adapt, _layers, _rules, _structure
from transferjax.surgery._checks import listed
from transferjax.surgery._rules import Rule
from transferjax.tree import regex

FACTORIES: dict[str, Callable[..., Rule]] = {
    function.__name__: function
    for function in (
        _adapt.adapt,
        _rules.cast,
        _rules.dots_to_slashes,
        _rules.fresh,
        _structure.fuse,
        _rules.permute,
        _rules.rename,
        _layers.repeat,
        _rules.reshape,
        _layers.select,
        _structure.split,
        _structure.stack,
        _structure.tie,
        _rules.torch_layout,
        _structure.unstack,
        _rules.waive,
    )
}
"""What writes a rule, by the name that a file of rules uses."""

EXPECTED = '[{"rename": ["(\\\\w+)\\\\.weight", "\\\\1/kernel"]}, {"waive": ["*.mask"], "optional": true}, ...]'


def rules_to_json(rules: Iterable[Rule]) -> str:
    r"""Rules as JSON: a list with one object per rule, its factory with the arguments, and options by name.

    Args:
      rules: rules made of strings and numbers.

    Returns:
      JSON, one rule per line.

    Raises:
      PlanError: a rule holds a function or a combined selector, or is one of your own. Keep such rules in Python.

    >>> from transferjax.surgery import rename, waive
    >>> print(rules_to_json([rename(r"(\w+)\.w", r"\1/kernel"), waive("*.mask", optional=True)]))
    [
      {"rename": ["(\\w+)\\.w", "\\1/kernel"]},
      {"waive": ["*.mask"], "optional": true}
    ]
    """
    lines = [json.dumps(_dumped(rule)) for rule in listed(rules, "rules_to_json()")]
    return "[\n" + ",\n".join(f"  {line}" for line in lines) + "\n]" if lines else "[]"


def rules_from_json(text: str) -> tuple[Rule, ...]:
    """The rules that :func:`rules_to_json` or a person wrote.

    Args:
      text: JSON, a list with one object per rule: ``{"rename": ["pattern", "replacement"], "otherwise": true}``. A
        selector is a glob, or ``{"regex": "pattern"}``.

    Returns:
      The rules, in their order.

    Raises:
      PlanError: the text is no such JSON, or an argument of a rule is malformed.

    >>> rules_from_json('[{"fresh": ["head/**"]}, {"permute": ["**/kernel", {"2": [1, 0], "4": [2, 3, 1, 0]}]}]')
    (fresh('head/**'), permute('**/kernel', {2: (1, 0), 4: (2, 3, 1, 0)}))
    """
    if not isinstance(text, (str, bytes)):
        raise PlanError(f"the rules come as {type(text).__name__}; expected JSON text: path.read_text().")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"the rules are no JSON: {error}. Expected {EXPECTED}.") from None
    if not isinstance(found, list):
        raise PlanError(f"the rules are {type(found).__name__} in JSON. Expected a list: {EXPECTED}.")
    return tuple(_made(number, entry) for number, entry in enumerate(found))


def rules_to_python(rules: Iterable[Rule]) -> str:
    r"""Rules as a Python file that defines ``RULES``.

    Args:
      rules: rules; each prints as it is written.

    Returns:
      Python source. A function in a rule comes out by its name: define it in the file.

    >>> from transferjax.surgery import rename
    >>> print(rules_to_python([rename(r"(\w+)\.w", r"\1/kernel")]))
    from transferjax.surgery import rename
    <BLANKLINE>
    RULES = (
        rename(r'(\w+)\.w', r'\1/kernel'),
    )
    <BLANKLINE>
    """
    lines = [repr(rule) for rule in listed(rules, "rules_to_python()")]
    names = sorted({line.partition("(")[0] for line in lines})
    selectors = [name for name in ("glob", "regex") if any(f"{name}(" in line for line in lines)]
    head = [f"from transferjax.surgery import {', '.join(names)}"] if names else []
    head += [f"from transferjax.tree import {', '.join(selectors)}"] if selectors else []
    return "\n".join([*head, *([""] if head else []), "RULES = (", *(f"    {line}," for line in lines), ")", ""])


def _dumped(rule: Rule) -> dict[str, Any]:
    try:
        call = ast.parse(repr(rule), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id not in FACTORIES:
            raise ValueError
        arguments = [_value(node) for node in call.args]
        options = {str(one.arg): _value(one.value) for one in call.keywords}
    except (ValueError, SyntaxError):
        raise PlanError(
            f"{rule!r} is not made of strings and numbers alone, so it is not written as JSON. Keep it in Python: "
            "rules_to_python(rules)."
        ) from None
    return {call.func.id: arguments, **options}


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "regex" and not node.keywords:
        return {"regex": ast.literal_eval(node.args[0])}
    return ast.literal_eval(node)


def _made(number: int, entry: Any) -> Rule:
    if not isinstance(entry, dict) or not entry:
        raise PlanError(f"rule {number} is {json.dumps(entry)[:80]}. Expected an object such as {EXPECTED[1:58]}.")
    name = next(iter(entry))
    if name not in FACTORIES:
        known = ", ".join(FACTORIES)
        raise PlanError(f"rule {number} is '{name}'. Expected one of {known}.{nearest_hint(name, FACTORIES, 1)}")
    given = entry[name]
    arguments = [_read(one) for one in (given if isinstance(given, list) else [given])]
    options = {key: _read(value) for key, value in entry.items() if key != name}
    try:
        return FACTORIES[name](*arguments, **options)
    except (TypeError, PlanError) as error:
        raise PlanError(f"rule {number} of the file, {name}, does not fit its factory: {error}") from None


def _read(value: Any) -> Any:
    """JSON as arguments: ``{"regex": ...}`` is a selector, and the keys of other objects are whole numbers again."""
    if isinstance(value, dict) and set(value) == {"regex"} and isinstance(value["regex"], str):
        return regex(value["regex"])
    if isinstance(value, dict):
        return {int(key) if key.lstrip("-").isdecimal() else key: _read(one) for key, one in value.items()}
    return tuple(map(_read, value)) if isinstance(value, list) else value
