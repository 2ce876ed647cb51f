"""Report: facts as a table that is returned, never only printed."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Report:
    """A titled table of facts.

    Attributes:
      title: one line.
      columns: the names of the columns.
      rows: one tuple of cells per row, each as long as ``columns``.
      metadata: further facts by name (totals, units, versions).

    >>> print(Report("Sizes", ("path", "bytes"), (("head/bias", 40),), {"total": 40}))
    Sizes
    path       bytes
    ---------  -----
    head/bias     40
    total: 40
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "columns", tuple(self.columns))
        object.__setattr__(self, "rows", tuple(tuple(row) for row in self.rows))
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"row {number} of report '{self.title}' has {len(row)} cells; expected {len(self.columns)}, "
                    f"one per column ({', '.join(self.columns)})."
                )

    def __str__(self) -> str:
        return self.to_text()

    def column(self, name: str) -> list[Any]:
        """All cells of one column, top to bottom."""
        if name not in self.columns:
            raise KeyError(f"report '{self.title}' has no column '{name}'. Columns: {', '.join(self.columns)}.")
        index = self.columns.index(name)
        return [row[index] for row in self.rows]

    def to_dicts(self) -> list[dict[str, Any]]:
        """One ``{column: cell}`` per row."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def to_text(self) -> str:
        """The table as aligned plain text: numbers to the right, words to the left."""
        cells = [[format_cell(c) for c in row] for row in self.rows]
        widths = [max([len(n), *(len(r[i]) for r in cells)]) for i, n in enumerate(self.columns)]
        right = [all(_is_number(row[i]) for row in self.rows) and bool(self.rows) for i in range(len(self.columns))]

        def line(values):
            parts = [v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True)]
            return "  ".join(parts).rstrip()

        body = [line(self.columns), "  ".join("-" * w for w in widths), *map(line, cells)] if self.columns else []
        return "\n".join([self.title, *body, *(f"{k}: {format_cell(v)}" for k, v in self.metadata.items())])

    def to_markdown(self) -> str:
        """The table in GitHub-flavoured Markdown."""
        escape = lambda v: format_cell(v).replace("|", "\\|")
        rows = ["| " + " | ".join(map(escape, row)) + " |" for row in (self.columns, *self.rows)]
        rule = "|" + "---|" * len(self.columns)
        facts = [f"- {k}: {format_cell(v)}" for k, v in self.metadata.items()]
        return "\n".join([f"### {self.title}", "", rows[0], rule, *rows[1:], *([""] if facts else []), *facts])

    def to_json(self) -> str:
        """The whole report as JSON; numbers stay numbers."""
        return json.dumps(
            {
                "title": self.title,
                "columns": self.columns,
                "rows": self.rows,
                "metadata": dict(self.metadata),
            },
            default=_plain,
        )

    def to_html(self) -> str:
        """The table as an HTML fragment."""
        row = lambda tag, values: (
            "<tr>" + "".join(f"<{tag}>{html.escape(format_cell(v))}</{tag}>" for v in values) + "</tr>"
        )
        body = "".join(row("td", r) for r in self.rows)
        facts = "".join(f"<li>{html.escape(k)}: {html.escape(format_cell(v))}</li>" for k, v in self.metadata.items())
        return (
            f"<h3>{html.escape(self.title)}</h3><table><thead>{row('th', self.columns)}</thead>"
            f"<tbody>{body}</tbody></table>" + (f"<ul>{facts}</ul>" if facts else "")
        )

    def _repr_html_(self) -> str:
        return self.to_html()


def format_cell(value: Any) -> str:
    """One cell as text: grouped integers, four significant digits, nothing for ``None``.

    >>> format_cell(1234567), format_cell(0.123456), format_cell(None)
    ('1,234,567', '0.1235', '')
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    return str(value)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else str(value)
