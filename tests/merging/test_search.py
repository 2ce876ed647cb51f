"""search: all coefficients in one program and one pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transferjax._errors import DataError
from transferjax.merging import search, slerp, soup, task_arithmetic, ties, wise_ft

RNG = np.random.default_rng(0)
BASE, TUNED = ({"w": RNG.standard_normal((4, 3)).astype(np.float32)} for _ in range(2))
BATCHES = [
    {"inputs": RNG.standard_normal((size, 4)).astype(np.float32), "labels": RNG.integers(0, 3, size)} for size in (8, 5)
]


def likelihood(params, batch):
    logs = jax.nn.log_softmax(batch["inputs"] @ params["w"])
    return jnp.mean(logs[jnp.arange(len(logs)), batch["labels"]])


def along(alpha):
    return wise_ft(BASE, TUNED, alpha)


def test_it_finds_what_a_loop_finds():
    alphas = np.linspace(0, 1, 7)
    found = search(along, alphas, likelihood, BATCHES)
    whole = {key: np.concatenate([batch[key] for batch in BATCHES]) for key in BATCHES[0]}
    expected = [float(likelihood(along(alpha), whole)) for alpha in alphas]
    np.testing.assert_allclose(found.column("score"), expected, rtol=1e-6)
    assert found.column("coefficient") == alphas.tolist() and found.columns == ("coefficient", "score")
    assert found.metadata["best"] == alphas[int(np.argmax(expected))]
    assert found.metadata["best score"] == pytest.approx(max(expected))


def test_each_batch_is_read_once_and_each_shape_compiled_once():
    read, traced = [], []

    def batches():
        for number in range(4):
            read.append(number)
            yield BATCHES[0]

    def evaluate(params, batch):
        traced.append(1)
        return likelihood(params, batch)

    search(along, [0.0, 0.5, 1.0], evaluate, batches())
    assert read == [0, 1, 2, 3] and len(traced) == 1


def test_weights_of_examples_weigh_their_batches():
    score = lambda params, batch: jnp.mean(batch["inputs"])
    batches = [
        {"inputs": np.full(2, 1.0), "weight": np.array([1.0, 0.0])},
        {"inputs": np.full(2, 4.0), "weight": np.ones(2)},
    ]
    assert search(along, [0.0], score, batches).column("score") == [3.0]


def test_a_coefficient_may_be_a_vector():
    weights = [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
    merge = lambda weights: soup([BASE, TUNED], weights)
    target = soup([BASE, TUNED])["w"]
    found = search(merge, weights, lambda params: -jnp.abs(params["w"] - target).max())
    assert found.metadata["best"] == (0.5, 0.5) and found.column("coefficient")[2] == (0.0, 1.0)


MERGES = {
    "task_arithmetic": lambda scale: task_arithmetic(BASE, [TUNED], scale=scale),
    "task weights": lambda weight: task_arithmetic(BASE, [TUNED, BASE], [weight, 1.0]),
    "ties": lambda scale: ties(BASE, [TUNED], density=0.5, scale=scale),
    "slerp": lambda t: slerp(BASE, TUNED, t),
    "wise_ft": along,
}


@pytest.mark.parametrize("name", MERGES)
def test_methods_are_traced_with_their_coefficient(name):
    found = search(MERGES[name], [0.0, 0.3, 1.0], lambda params: jnp.sum(params["w"] ** 3))
    expected = [float(np.sum(MERGES[name](value)["w"] ** 3)) for value in (0.0, 0.3, 1.0)]
    np.testing.assert_allclose(found.column("score"), expected, rtol=1e-5)


def test_there_is_room_for_one_merged_tree_only():
    """However many coefficients: the program's own memory is less than two trees."""
    base, tuned = ({"w": jnp.full((512, 512), value)} for value in (1.0, 2.0))
    score = lambda alpha: jnp.sum(jnp.sin(wise_ft(base, tuned, alpha)["w"]) @ jnp.ones((512, 8)))
    run = jax.jit(lambda points: jax.lax.map(score, points)).lower(jnp.zeros(64)).compile()
    assert run.memory_analysis().temp_size_in_bytes < 2 * base["w"].nbytes


def test_scores_that_are_not_finite_are_never_the_best():
    evaluate = lambda params: jnp.where(params["w"][0, 0] == BASE["w"][0, 0], jnp.nan, -1.0)
    assert search(along, [0.0, 1.0], evaluate).metadata["best"] == 1.0


@pytest.mark.parametrize("coefficients", [[], 0.5, [np.nan], [[[1.0]]]])
def test_coefficients_are_a_list_of_numbers(coefficients):
    with pytest.raises(DataError, match=r"search\(\) got coefficients .*Expected finite numbers \[K\] or \[K, m\]"):
        search(along, coefficients, likelihood)


@pytest.mark.parametrize("batches", [[], [{"inputs": np.ones((2, 4)), "weight": np.zeros(2)}]])
def test_something_is_evaluated(batches):
    with pytest.raises(DataError, match=r"search\(\) got no batch, or none with weight"):
        search(along, [0.5], lambda params, batch: 0.0, batches)


def test_a_score_is_a_scalar():
    with pytest.raises(DataError, match=r"search\(\) got a score of shape \(4, 3\) from evaluate. Expected a scalar"):
        search(along, [0.5], lambda params: params["w"])


def test_some_score_is_finite():
    with pytest.raises(DataError, match=r"search\(\) found no finite score at any coefficient"):
        search(along, [0.5], lambda params: jnp.nan)
