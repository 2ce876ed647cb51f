"""Task vectors against mergekit, and by hand."""

import jax
import numpy as np
import pytest

from transferjax._errors import DataError
from transferjax.merging import breadcrumbs, task_arithmetic, ties

BASE = {"w": np.zeros(5, np.float32)}


def tree(*values):
    return {"w": np.array(values, np.float32)}


@pytest.mark.parametrize("case", ["ties", "ties-weighted", "ties-negative", "ties-dense"])
def test_ties_is_that_of_mergekit(case, peer, close):
    close(ties(peer.base, peer.models, **peer.options(case)), peer.tree(case))


@pytest.mark.parametrize("case", ["breadcrumbs", "breadcrumbs-full"])
def test_breadcrumbs_is_that_of_mergekit(case, peer, close):
    close(breadcrumbs(peer.base, peer.models, **peer.options(case)), peer.tree(case))


def test_task_arithmetic_is_that_of_mergekit(peer, close):
    found = task_arithmetic(peer.base, peer.models, **peer.options("task_arithmetic"))
    close(found, peer.tree("task_arithmetic"))


@pytest.mark.parametrize(
    ("name", "options", "models", "expected"),
    [
        ("the larger sum elects", {}, [(3, 0, 0, 0, 0), (-1, 0, 0, 0, 0)], (3, 0, 0, 0, 0)),
        ("a sum of zero is positive", {}, [(2, 0, 0, 0, 0), (-2, 0, 0, 0, 0)], (2, 0, 0, 0, 0)),
        ("those that agree are averaged", {}, [(1, 0, 0, 0, 0), (5, 0, 0, 0, 0)], (3, 0, 0, 0, 0)),
        ("by their weights", {"weights": [3, 1]}, [(1, 0, 0, 0, 0), (5, 0, 0, 0, 0)], (2, 0, 0, 0, 0)),
        ("weights elect too", {"weights": [4, 1]}, [(1, 0, 0, 0, 0), (-3, 0, 0, 0, 0)], (1, 0, 0, 0, 0)),
        ("what is zero does not count", {}, [(4, 4, 0, 0, 0), (0, 2, 0, 0, 0)], (4, 3, 0, 0, 0)),
        ("two of five are kept", {"density": 0.4}, [(1, 2, 3, 0, 0)], (0, 2, 3, 0, 0)),
        ("of equal ones the first", {"density": 0.4}, [(1, -1, 1, 1, 1)], (1, -1, 0, 0, 0)),
        ("none is kept", {"density": 0.0}, [(1, 2, 3, 4, 5)], (0, 0, 0, 0, 0)),
        ("fewer than one is kept", {"density": 0.19}, [(1, 2, 3, 4, 5)], (0, 0, 0, 0, 0)),
        ("scale is the last factor", {"scale": -2.0}, [(1, 2, 0, 0, 0)], (-2, -4, 0, 0, 0)),
    ],
)
def test_ties_by_hand(name, options, models, expected):
    found = ties(BASE, [tree(*model) for model in models], **{"density": 1.0, **options})
    assert found["w"].tolist() == list(expected)


def test_the_arguments_of_ties_by_position():
    models = [tree(1, 2, 3, 4, 5), tree(5, 4, 3, 2, 1)]
    by_name = ties(BASE, models, weights=[1.0, 2.0], density=0.6, scale=0.5)
    assert ties(BASE, models, [1.0, 2.0], 0.6, 0.5)["w"].tolist() == by_name["w"].tolist()


def test_breadcrumbs_drops_fewer_outliers_where_not_so_many_are_left():
    found = breadcrumbs(BASE, [tree(5, 4, 3, 2, 1)], density=0.8, gamma=0.6)
    assert found["w"].tolist() == [0, 4, 3, 2, 1]


def test_negation_forgets_a_task():
    assert task_arithmetic(BASE, [tree(1, 2, 3, 4, 5)], scale=-1.0)["w"].tolist() == [-1, -2, -3, -4, -5]


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("method", [ties, breadcrumbs])
def test_under_jit_the_same_entries_are_kept_of_equal_ones(method, density):
    rng = np.random.default_rng(0)
    base = {"w": np.zeros((20, 30), np.float32)}
    models = [{"w": rng.integers(-3, 4, (20, 30)).astype(np.float32)} for _ in range(3)]
    call = lambda base, models: method(base, models, density=density)
    np.testing.assert_allclose(jax.jit(call)(base, models)["w"], call(base, models)["w"], rtol=1e-6)


@pytest.mark.parametrize("density", [-0.1, 1.5, float("nan"), "0.2", None, True, [0.2]])
def test_a_density_is_a_share(density):
    with pytest.raises(DataError, match=r"ties\(\) got density=.*Expected a share of the elements in \[0, 1\]"):
        ties(BASE, [BASE], density=density)


def test_a_density_is_not_traced():
    with pytest.raises(DataError, match=r"got a traced density. Expected a number: it says how many elements are kept"):
        jax.jit(lambda density: ties(BASE, [BASE], density=density))(0.5)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", None, [1.0, 2.0]])
def test_a_scale_is_a_finite_number(scale):
    with pytest.raises(DataError, match=r"task_arithmetic\(\) got scale=.*Expected a finite number"):
        task_arithmetic(BASE, [BASE], scale=scale)


def test_what_grows_beyond_its_dtype_raises():
    base, model = {"w": np.zeros(3, np.float16)}, {"w": np.full(3, 6e4, np.float16)}
    with pytest.raises(DataError, match=r"'w' merges to numbers beyond float16. Expected smaller coefficients"):
        task_arithmetic(base, [model], scale=2.0)
