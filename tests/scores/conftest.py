"""The cases of the stored scores."""

import pathlib

import numpy as np
import pytest

STORED = pathlib.Path(__file__).parent.parent / "fixtures" / "scores" / "scores.npz"


@pytest.fixture(scope="session")
def stored():
    with np.load(STORED) as file:
        return dict(file)


@pytest.fixture(params=["tall", "wide", "unbalanced", "skipped"])
def case(request, stored):
    """One case: its features, labels, probs and targets, and what the peer scores them."""
    begin = f"{request.param}-"
    return {name.removeprefix(begin): value for name, value in stored.items() if name.startswith(begin)}
