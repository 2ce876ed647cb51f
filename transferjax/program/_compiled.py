"""What XLA itself says of a compiled program."""

from __future__ import annotations

from typing import Any, NamedTuple


class Measurement(NamedTuple):
    """XLA's figures for one compiled program; ``None`` where the backend does not say.

    Attributes:
      flops: XLA's FLOPs; the body of a loop counts once, whatever its length.
      bytes_accessed: bytes that the fused program reads and writes; loops count once.
      argument_bytes: bytes of all arguments.
      output_bytes: bytes of all results, those that reuse an argument included.
      alias_bytes: bytes of results that reuse a donated argument.
      temporary_bytes: bytes held while the program runs, arguments and results aside.
      code_bytes: bytes of the generated code.
    """

    flops: float | None
    bytes_accessed: float | None
    argument_bytes: int | None
    output_bytes: int | None
    alias_bytes: int | None
    temporary_bytes: int | None
    code_bytes: int | None


def measure(compiled: Any) -> Measurement:
    """XLA's cost and memory analysis of a compiled program.

    Args:
      compiled: what ``jax.jit(f).lower(...).compile()`` returns.

    Returns:
      A :class:`Measurement`.

    Raises:
      TypeError: the program is not compiled.

    >>> import jax, jax.numpy as jnp
    >>> measure(jax.jit(lambda x: x + 1).lower(jnp.ones(4)).compile()).argument_bytes
    16
    """
    if not hasattr(compiled, "memory_analysis"):
        raise TypeError(
            f"measure() expects a compiled program, got {type(compiled).__name__}. "
            "Write measure(jax.jit(f).lower(*args).compile())."
        )
    table: Any = compiled.cost_analysis() or {}
    memory = compiled.memory_analysis()
    size = lambda name: getattr(memory, f"{name}_size_in_bytes", None)
    return Measurement(
        table.get("flops"),
        table.get("bytes accessed"),
        size("argument"),
        size("output"),
        size("alias"),
        size("temp"),
        size("generated_code"),
    )
