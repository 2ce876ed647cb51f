"""Run: one directory with everything that a fine-tuning run leaves behind, and all that resuming it needs."""

from __future__ import annotations

import base64
import dataclasses
import errno
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from transferjax._errors import CheckpointError, describe
from transferjax._report import Report
from transferjax.io._beside import folder_beside, remove_leftovers, write_bytes, writing
from transferjax.io._figure import write_figure
from transferjax.io._replace import absolute
from transferjax.io._state import difference, read_manifest, read_state, write_state
from transferjax.surgery import Plan

CONFIG, PLAN, METRICS, CHECKPOINTS = "config.json", "plan.json", "metrics.jsonl", "checkpoints"
PARTS = {
    "trainable": "tuning",
    "opt_state": "optimizer",
    "extra": "model",
    "key": "kind of random key",
    "step": "kind of step",
}
"""What another outline of each part of a state means."""


@dataclasses.dataclass(frozen=True)
class Run:
    """The directory of one fine-tuning run; make it with :meth:`create` or :meth:`open`.

    ::

        config.json      what was asked for
        plan.json        where every weight came from
        metrics.jsonl    one line per logged step; survives a kill at any time
        checkpoints/N/   the state after step N: trainable leaves only, the data iterator's state, and the
                         fingerprint of the base, so that it is never restored onto another one
        report.md, curves.png

    Attributes:
      path: the directory.
      config: the contents of ``config.json``.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> run = Run.create(f"{folder.name}/digits", {"seed": 0})
    >>> run.log(1, {"loss": 0.5})
    >>> Run.open(f"{folder.name}/digits").metrics()
    [{'step': 1, 'loss': 0.5}]
    >>> folder.cleanup()
    """

    path: pathlib.Path
    config: Mapping[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", pathlib.Path(absolute(self.path, "Run", "write Run.create(path, config)")))

    @classmethod
    def create(cls, path: str | os.PathLike[str], config: Mapping[str, Any], plan: Any = None) -> Run:
        """A new run directory.

        Args:
          path: a directory that does not exist, or is empty; missing parents are made.
          config: what describes the run; must survive JSON. Its ``"seed"`` is compared on :meth:`restore`.
          plan: the surgery ``Plan`` that made the base, or ``None``.

        Raises:
          CheckpointError: the directory holds something, cannot be written, or the config is no JSON.
        """
        path = pathlib.Path(absolute(path, "Run.create", "write Run.create(path, config)"))
        if plan is not None and not isinstance(plan, Plan):
            raise CheckpointError(f"Run.create() expects a surgery Plan or None third, got {type(plan).__name__}.")
        try:
            text = json.dumps(dict(config), indent=2)
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"the config of a run must be plain JSON (numbers, strings, lists, dicts): {error}."
            ) from None
        if (path / CONFIG).exists():
            raise CheckpointError(f"'{path}' already holds a run. Resume it, or choose another directory.")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise CheckpointError(f"'{path}' already exists and is no run. Expected a new or empty directory.")
        with folder_beside(path) as beside:
            write_bytes(beside / CONFIG, text.encode())
            if plan is not None:
                write_bytes(beside / PLAN, plan.to_json().encode())
            with writing(path):
                (beside / CHECKPOINTS).mkdir()
        return cls(path, json.loads(text))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Run:
        """A run directory that exists.

        Raises:
          CheckpointError: it is no run directory, or its config is damaged.
        """
        path = pathlib.Path(absolute(path, "Run.open", "write Run.open(path)"))
        try:
            config = json.loads((path / CONFIG).read_bytes())
        except OSError as error:
            raise CheckpointError(
                f"'{path}' is no run directory: '{CONFIG}' cannot be read ({error.strerror or error}). "
                "Expected a directory that Run.create (or `transferjax finetune --output`) made."
            ) from None
        except ValueError:
            raise CheckpointError(f"'{path / CONFIG}' is damaged: it is no JSON.") from None
        if not isinstance(config, dict):
            raise CheckpointError(f"'{path / CONFIG}' is damaged: expected a JSON object.")
        return cls(path, config)

    @property
    def plan(self) -> Any:
        """The surgery ``Plan`` that made the base, or ``None``."""
        where = self.path / PLAN
        if not where.exists():
            return None
        try:
            return Plan.from_json(where.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"'{where}' cannot be read: {error}.") from None

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps of which a checkpoint is there, oldest first."""
        folder = self.path / CHECKPOINTS
        return tuple(sorted(int(found.name) for found in folder.glob("*") if found.name.isdigit()))

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint, or ``None``."""
        return self.steps[-1] if self.steps else None

    def save(self, state: Any, base: str, batches_state: Any = None, *, keep: int = 2) -> None:
        """Writes a checkpoint, whole or not at all, and removes old ones.

        Args:
          state: the ``FinetuneState``; it is read, not donated.
          base: ``transferjax.io.fingerprint`` of the frozen weights, or of all weights before fine-tuning.
          batches_state: from ``batches.get_state()``: JSON or bytes.
          keep: how many of the newest checkpoints stay.

        Raises:
          CheckpointError: the disk is full or read-only, or several processes run.
        """
        if keep < 1:
            raise CheckpointError(f"Run.save() expects to keep at least 1 checkpoint, got {keep}.")
        if jax.process_count() > 1:
            raise CheckpointError(f"Run.save() writes from one process; {jax.process_count()} run.")
        folder = self.path / CHECKPOINTS
        with writing(folder):
            folder.mkdir(exist_ok=True)
            remove_leftovers(folder)
        step = int(state.step)
        write_state(folder / str(step), state, {"step": step, "base": base, "batches": _encode_batches(batches_state)})
        for old in self.steps[:-keep]:
            shutil.rmtree(folder / str(old), ignore_errors=True)

    def restore(self, like: Any, base: str, seed: int | None = None, *, step: int | None = None) -> tuple[Any, Any]:
        """The state of a checkpoint, bit for bit; what was logged after it is dropped from ``metrics.jsonl``.

        Args:
          like: a ``FinetuneState`` of the same model, tuning and optimizer, from ``transferjax.init``; its values are
            not used, apart from the key, which must be the one of the run.
          base: the fingerprint that was given to :meth:`save`.
          seed: compared with the ``"seed"`` of the config, unless ``None``.
          step: which checkpoint; default: the newest.

        Returns:
          ``(state, batches_state)``.

        Raises:
          CheckpointError: another seed, base, tuning, optimizer or model; no checkpoint; or a damaged one.
        """
        state, batches_state = self.read(like, base, seed, step=step)
        self._forget_after(int(state.step))
        return state, batches_state

    def read(self, like: Any, base: str, seed: int | None = None, *, step: int | None = None) -> tuple[Any, Any]:
        """As :meth:`restore`, changing nothing in the directory: for evaluation and prediction."""
        step = self.latest if step is None else step
        if step is None or step not in self.steps:
            there = ", ".join(map(str, self.steps)) or "none"
            which = "no checkpoint yet" if step is None else f"no checkpoint of step {step}"
            raise CheckpointError(f"'{self.path}' has {which}. There: {there}.")
        folder = self.path / CHECKPOINTS / str(step)
        manifest = read_manifest(folder)
        self._check(manifest, like, base, seed)
        state = read_state(folder, manifest, like)
        if isinstance(like.key, jax.Array) and not np.array_equal(_words(state.key), _words(like.key)):
            raise CheckpointError(
                f"'{self.path}' was started with another seed: its random key differs from the one given. "
                "Expected the same key in transferjax.init(key, ...)."
            )
        return state, _decode_batches(manifest["batches"])

    def _check(self, manifest: Mapping[str, Any], like: Any, base: str, seed: int | None) -> None:
        started = self.config.get("seed")
        if seed is not None and started is not None and seed != started:
            raise CheckpointError(
                f"'{self.path}' was started with another seed: {started}, not {seed}. Expected the same seed; "
                "for another one start a new run."
            )
        if manifest["base"] != base:
            raise CheckpointError(
                f"'{self.path}' was trained on another base: its fingerprint is {manifest['base']}, the one given is "
                f"{base}. Expected the same pretrained weights."
            )
        for prefix, noun in PARTS.items():
            found = difference(manifest, like, prefix)
            if found:
                raise CheckpointError(
                    f"'{self.path}' was trained with another {noun}: {found}. Expected the same {noun}; "
                    "for another one start a new run."
                )

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one line to ``metrics.jsonl``.

        Args:
          step: the number of the step.
          metrics: ``{name: scalar}``; a value that is not finite becomes ``null``.

        Raises:
          CheckpointError: a value is no scalar, or the line cannot be written.
        """
        line = {"step": int(step), **{name: _number(name, value) for name, value in metrics.items()}}
        where = self.path / METRICS
        data = json.dumps(line).encode() + b"\n"
        with writing(where), open(where, "a+b", buffering=0) as file:
            before = _cut_after_last_line(file)
            try:
                if file.write(data) != len(data):  # A disk that fills up takes a part first.
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(before)
                raise

    def metrics(self) -> list[dict[str, Any]]:
        """Everything that was logged: one dict per step, in order, with ``"step"`` first.

        Several lines of one step are one dict, where the later line wins. A last line that a kill cut off is dropped.

        Raises:
          CheckpointError: another line is damaged.
        """
        found: dict[int, dict[str, Any]] = {}
        for line in self._lines():
            found.setdefault(line["step"], {}).update(line)
        return [found[step] for step in sorted(found)]

    def write_report(self, report: Report) -> pathlib.Path:
        """Writes ``report.md`` and returns its path.

        Raises:
          CheckpointError: it cannot be written.
        """
        write_bytes(self.path / "report.md", (report.to_markdown() + "\n").encode())
        return self.path / "report.md"

    def write_figure(self, figure: Any, name: str = "curves.png") -> pathlib.Path:
        """Writes a matplotlib ``Figure`` and returns the path; the ending of ``name`` chooses the format.

        Raises:
          CheckpointError: it cannot be written.
        """
        return write_figure(self.path / name, figure)

    def _lines(self) -> list[dict[str, Any]]:
        where = self.path / METRICS
        try:
            raw = where.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"'{where}' cannot be read: {error.strerror or error}.") from None
        whole = raw[: raw.rfind(b"\n") + 1].splitlines()
        try:
            lines = [json.loads(line) for line in whole]
            if all(isinstance(line, dict) and isinstance(line.get("step"), int) for line in lines):
                return lines
        except ValueError:
            pass
        raise CheckpointError(f"'{where}' is damaged: expected one JSON object with a \"step\" per line.")

    def _forget_after(self, step: int) -> None:
        lines = self._lines()
        kept = [line for line in lines if line["step"] <= step]
        if len(kept) < len(lines):
            write_bytes(self.path / METRICS, b"".join(json.dumps(line).encode() + b"\n" for line in kept))


def _cut_after_last_line(file: Any) -> int:
    """Removes the beginning of a line that a kill left at the end; returns where the next line starts."""
    end = start = file.seek(0, os.SEEK_END)
    while start:
        stop, start = start, max(0, start - 4096)
        file.seek(start)
        found = file.read(stop - start).rfind(b"\n")
        if found >= 0:
            start += found + 1
            break
    if start < end:
        file.truncate(start)
    return start


def _number(name: str, value: Any) -> Any:
    if isinstance(value, (str, bool)) or value is None:
        return value
    array = np.asarray(value)
    if str(array.dtype) == "bfloat16":
        array = array.astype(np.float32)
    if array.ndim or array.dtype.kind not in "bifu":
        raise CheckpointError(f"metric '{name}' is {describe(value)}; expected a scalar.")
    number = array.item()
    return number if np.isfinite(number) else None


def _encode_batches(state: Any) -> Any:
    if isinstance(state, bytes):
        return {"bytes": base64.b64encode(state).decode()}
    try:
        return {"json": json.loads(json.dumps(state))}
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the state of the batches must be JSON or bytes: {error}.") from None


def _decode_batches(found: Mapping[str, Any]) -> Any:
    return base64.b64decode(found["bytes"]) if "bytes" in found else found["json"]


def _words(key: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(key))
