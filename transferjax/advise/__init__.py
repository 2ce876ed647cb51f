"""Advice: which source, which road, which optimizer, and what it rests on."""

from transferjax.advise._advice import Advice, advise, rank
from transferjax.advise._agreement import score_agreement
from transferjax.advise._budget import Budget
from transferjax.advise._candidate import Candidate, measure
from transferjax.advise._evidence import Evidence, Published, Run, Task, evidence, open_local, record
from transferjax.advise._line import Line
from transferjax.advise._task import describe_task
from transferjax.advise._validate import Validation, leave_one_out, optimizer_rule

__all__ = [
    "Advice", "Budget", "Candidate", "Evidence", "Line", "Published", "Run", "Task", "Validation", "advise",
    "describe_task", "evidence", "leave_one_out", "measure", "open_local", "optimizer_rule", "rank", "record",
    "score_agreement",
]  # fmt: skip
