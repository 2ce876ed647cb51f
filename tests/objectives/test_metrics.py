"""Per-example metrics and the mean over a batch."""

import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax.objectives._metrics import mean, soft_cross_entropy, soft_targets

LOGITS = jnp.array([[1.0, 3.0, 2.0], [0.0, -1.0, -2.0]])


def test_labels_become_distributions():
    assert soft_targets(LOGITS, jnp.array([2, 0])).tolist() == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    soft = jnp.array([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    assert soft_targets(LOGITS, soft).tolist() == soft.tolist()
    for label in (-1, 3):
        rows = soft_targets(LOGITS, jnp.array([0, label]))
        assert rows[0].tolist() == [1.0, 0.0, 0.0] and bool(jnp.isnan(rows[1]).all())


@pytest.mark.parametrize("labels", [np.zeros(3, np.int32), np.zeros(2, np.float32), np.zeros((2, 2), np.float32)])
def test_labels_that_fit_no_logits_raise(labels):
    with pytest.raises(tj.DataError) as error:
        soft_targets(LOGITS, labels)
    assert str(error.value) == (
        f"labels are {labels.shape} {labels.dtype} for logits (2, 3) float32. "
        "Expected integers of shape (2,) or soft targets of shape (2, 3)."
    )


def test_cross_entropy_ignores_classes_without_mass_even_at_minus_infinity():
    assert soft_cross_entropy(jnp.array([0.0, 0.0, -jnp.inf]), jnp.array([0.5, 0.5, 0.0])) == pytest.approx(np.log(2))


def test_accuracy_and_top_k():
    batch = {"labels": jnp.array([2, 0])}
    assert tj.objectives.accuracy(LOGITS, batch).tolist() == [0.0, 1.0]
    assert tj.objectives.accuracy(LOGITS, {"labels": jnp.array([[0.1, 0.9, 0.0], [0.0, 0.0, 1.0]])}).tolist() == [1, 0]
    assert tj.objectives.top_k_accuracy(2)(LOGITS, batch).tolist() == [1.0, 1.0]
    assert tj.objectives.top_k_accuracy(1)(LOGITS, batch).tolist() == [0.0, 1.0]
    assert tj.objectives.top_k_accuracy(1) != tj.objectives.top_k_accuracy(2)
    assert hash(tj.objectives.top_k_accuracy(2).func) == hash(tj.objectives.top_k_accuracy(2).func)


def test_squared_error_averages_over_outputs_and_wants_equal_shapes():
    outputs = jnp.array([[1.0, 2.0], [0.0, 0.0]])
    assert tj.objectives.squared_error(outputs, {"labels": jnp.zeros((2, 2))}).tolist() == [2.5, 0.0]
    with pytest.raises(tj.DataError, match=r"labels are \(2,\) float32; expected the outputs' shape, \(2, 2\)\."):
        tj.objectives.squared_error(outputs, {"labels": jnp.zeros(2)})


def test_negative_log_likelihood():
    values = tj.objectives.negative_log_likelihood(LOGITS, {"labels": jnp.array([2, 0])})
    expected = -np.log(np.exp([2.0, 0.0]) / np.exp(np.asarray(LOGITS)).sum(-1))
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_the_mean_is_weighted_by_one_weight_per_example():
    values = jnp.array([1.0, 2.0, 6.0])
    assert float(mean(values, {})) == 3.0
    assert float(mean(values, {"weight": jnp.array([1.0, 1.0, 0.0])})) == 1.5
    assert float(mean(values, {"weight": jnp.zeros(3)})) == 0.0
    for weight in (jnp.ones((3, 1)), jnp.ones(()), jnp.ones(2)):
        with pytest.raises(tj.DataError, match=r"the batch's weight is .* float32; expected one per example, \(3,\)\."):
            mean(values, {"weight": weight})


@pytest.mark.parametrize("k", [0, "2"])
def test_top_k_counts_from_one(k):
    with pytest.raises(tj.TransferError, match=r"top_k_accuracy\(\) expects a whole number of at least 1, got"):
        tj.objectives.top_k_accuracy(k)
