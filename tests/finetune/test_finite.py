import jax.numpy as jnp
import numpy as np
import pytest

from transferjax.finetune._finite import SMALL, all_finite


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["small", "large", "half"])
def test_one_bad_number_anywhere_is_found(bad, place):
    tree = {
        "small": jnp.ones((3, 2)),
        "large": jnp.full(SMALL + 1, 3e38),
        "half": jnp.ones(5, jnp.bfloat16),
        "scalar": jnp.zeros(()),
    }
    assert bool(all_finite(tree))
    assert not bool(
        all_finite({**tree, place: tree[place].at[-1].set(bad) if tree[place].ndim == 1 else tree[place] * bad})
    )


def test_an_empty_tree_is_finite():
    assert bool(all_finite({}))
