"""Front: the coefficients that are worth having, and the one to take."""

import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax.finetune import front

POINTS = {0.0: (0.1, 0.8), 0.25: (0.5, 0.8), 0.5: (0.7, 0.795), 0.75: (0.6, 0.7), 1.0: (0.9, 0.4)}


def on_front(report):
    return [c for c, on in zip(report.column("coefficient"), report.column("on the front")) if on]


def test_points_that_another_beats_are_not_on_the_front():
    assert on_front(front(POINTS)) == [0.25, 0.5, 1.0]


def test_equal_points_are_both_on_it():
    assert on_front(front({"a": (0.5, 0.5), "b": (0.5, 0.5), "c": (0.5, 0.4)})) == ["a", "b"]


def test_the_front_of_random_points_is_that_of_the_definition():
    rng = np.random.default_rng(0)
    points = {n: tuple(rng.integers(0, 8, 2) / 8 + 0.1) for n in range(40)}
    best = [
        n
        for n, (t, s) in points.items()
        if not any(t2 >= t and s2 >= s and (t2, s2) != (t, s) for t2, s2 in points.values())
    ]
    assert on_front(front(points)) == best


@pytest.mark.parametrize(
    ("options", "chosen", "why"),
    [
        ({}, 1.0, "the best on the target; nothing was asked of the source"),
        ({"keep": 1.0}, 0.25, "the best on the target of 2 that keep 100 % of 0.8 on the source"),
        ({"keep": 0.99}, 0.5, "the best on the target of 3 that keep 99 % of 0.8 on the source"),
        ({"keep": 0.5, "base": 0.8}, 1.0, "the best on the target of 5 that keep 50 % of 0.8 on the source"),
        ({"keep": 1.0, "base": 0.9}, None, "none keeps 100 % of 0.9 on the source; the most is 88.9 % at 0.0"),
    ],
)
def test_the_best_on_the_target_of_those_that_keep_enough_is_chosen(options, chosen, why):
    report = front(POINTS, **options)
    assert report.metadata["chosen"] == chosen and report.metadata["why"] == why
    assert report.column("chosen") == [coefficient == chosen for coefficient in POINTS]


def test_of_equal_ones_the_better_on_the_source_is_chosen():
    assert front({"a": (0.5, 0.5), "b": (0.5, 0.6)}).metadata["chosen"] == "b"


def test_exactly_enough_is_enough():
    for source in (0.8, 0.7, 0.3):
        assert front({0: (0.1, source), 1: (0.2, 0.99 * source)}, keep=0.99).metadata["chosen"] == 1


def test_the_coefficient_of_wise_ft_is_chosen_from_two_searches():
    base, tuned = {"w": jnp.zeros(())}, {"w": jnp.ones(())}
    merge = lambda alpha: tj.merging.wise_ft(base, tuned, alpha)
    target, source = (
        tj.merging.search(merge, [0.0, 0.5, 1.0], lambda params, at=at: 1 - 0.5 * (params["w"] - at) ** 2)
        for at in (1.0, 0.0)
    )
    report = front({alpha: (t, s) for (alpha, t), (_, s) in zip(target.rows, source.rows)}, keep=0.8)
    assert report.metadata["chosen"] == 0.5 and on_front(report) == [0.0, 0.5, 1.0]
    assert report.column("source kept") == [1.0, 0.875, 0.5]


@pytest.mark.parametrize(
    ("points", "options", "message"),
    [
        ({}, {}, r"front\(\) got no point\. Expected \{coefficient: \(target, source\)\}"),
        ([1, 2], {}, r"front\(\) got list\. Expected \{coefficient"),
        ({0.5: 0.3}, {}, r"front\(\) got float at 0\.5\. Expected \(target, source\)"),
        ({0.5: (0.3, float("nan"))}, {}, r"the source accuracy at 0\.5 is nan\. Expected a finite number"),
        ({0.5: (None, 0.3)}, {}, r"the target accuracy at 0\.5 is NoneType\. Expected a finite"),
        (POINTS, {"keep": 1.1}, r"front\(\) got keep=1\.1\. Expected a share in \(0, 1\]"),
        (POINTS, {"base": -1}, r"as a share of -1, the source's accuracy before\. Expected a number above 0"),
    ],
)
def test_what_cannot_be_weighed_raises(points, options, message):
    with pytest.raises(tj.DataError, match=message):
        front(points, **options)
