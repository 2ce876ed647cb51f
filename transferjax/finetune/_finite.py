"""One flag for a whole tree: is every number in it finite?"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

SMALL = 4096
"""Leaves of at most so many elements are checked together: a reduction each would be half of the step's kernels."""


def all_finite(tree: Any) -> jax.Array:
    """Whether no element of any leaf is NaN or infinite; scalar bool.

    >>> import jax.numpy as jnp
    >>> bool(all_finite({"a": jnp.ones(3), "b": jnp.array([1.0, jnp.nan])}))
    False
    """
    leaves = jax.tree.leaves(tree)
    flags = [jnp.all(jnp.isfinite(leaf)) for leaf in leaves if leaf.size > SMALL]
    by_dtype: dict[Any, list[jax.Array]] = {}
    for leaf in leaves:
        if leaf.size <= SMALL:
            by_dtype.setdefault(leaf.dtype, []).append(leaf.reshape(-1))
    flags += [jnp.all(jnp.isfinite(jnp.concatenate(small))) for small in by_dtype.values()]
    return jnp.all(jnp.stack(flags)) if flags else jnp.array(True)
