"""Three models and their base, and what mergekit makes of them."""

import json
import pathlib
from typing import NamedTuple

import numpy as np
import pytest

STORED = pathlib.Path(__file__).parent.parent / "fixtures" / "merging" / "merging.npz"


class Peer(NamedTuple):
    """What stands in ``merging.npz``: a tree by its name, the models, and the options of a case."""

    arrays: dict

    def tree(self, name):
        return {path: self.arrays[f"{name}-{path}"] for path in ("kernel", "bias")}

    @property
    def base(self):
        return self.tree("base")

    @property
    def models(self):
        return [self.tree(f"model{number}") for number in range(3)]

    def options(self, case):
        """As our functions call them."""
        found = json.loads(str(self.arrays["cases"]))[case]
        names = {"weight": "weights", "lambda": "scale"}
        return {names.get(name, name): value for name, value in found.items()}


@pytest.fixture(scope="session")
def peer():
    with np.load(STORED) as file:
        return Peer(dict(file))


@pytest.fixture
def close():
    """Two trees agree to a few roundings of float32."""

    def check(found, expected):
        assert found.keys() == expected.keys()
        for path in expected:
            np.testing.assert_allclose(found[path], expected[path], rtol=2e-6, atol=2e-7, err_msg=path)

    return check
