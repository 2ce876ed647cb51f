"""EVA begins along the principal directions of the inputs, and gives ranks to the kernels that need them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax import interop
from transferjax._errors import SelectionError
from transferjax.tuning import Moments, eva

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def moments(rows):
    return Moments(len(rows), rows.sum(0), rows.T @ rows)


def spread(*scales, count=200):
    """Rows that vary by these amounts along random orthogonal directions, around a mean far from zero."""
    turn = np.linalg.qr(RNG.normal(size=(len(scales),) * 2))[0]
    return RNG.normal(size=(count, len(scales))) * scales @ turn + 5.0


ROWS = {"a": spread(9, 5, 1, 1, 0.5, 0.5), "b": spread(4, 4, 4, 4, 4, 4)}
PARAMS = {"a": jnp.ones((6, 5)), "b": jnp.ones((6, 6))}
FOUND = {path: moments(rows) for path, rows in ROWS.items()}


def test_a_begins_with_the_right_singular_vectors_of_the_centred_inputs():
    trainable, frozen = eva("*", 2, FOUND, rho=1).init(KEY, PARAMS)
    for path, rows in ROWS.items():
        a = np.asarray(trainable[path]["lora_a"])
        expected = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:2].T
        assert a.shape == (6, 2)
        np.testing.assert_allclose(np.abs(np.sum(a * expected, 0)), 1.0, atol=1e-5)
        assert not np.any(trainable[path]["lora_b"])
        assert (a[np.abs(a).argmax(0), range(2)] > 0).all()
    jax.tree.map(np.testing.assert_array_equal, frozen, PARAMS)


def reference_ranks(rank, rho):
    """Explained variance ratios of all kernels, sorted, the largest taken."""
    ratios = []
    for path, rows in ROWS.items():
        variance = np.linalg.svd(rows - rows.mean(0), compute_uv=False) ** 2
        ratios += [(ratio, path) for ratio in (variance / variance.sum())[: round(rho * rank)]]
    taken = [path for _, path in sorted(ratios, reverse=True)[: rank * len(ROWS)]]
    return {path: taken.count(path) for path in ROWS}


@pytest.mark.parametrize(("rank", "rho"), [(1, 2.0), (2, 1.5), (2, 2.0), (3, 1.0)])
def test_ranks_go_where_they_explain_most(rank, rho):
    trainable, _ = eva("*", rank, FOUND, rho=rho).init(KEY, PARAMS)
    found = {path: leaf["lora_a"].shape[1] if isinstance(leaf, dict) else 0 for path, leaf in trainable.items()}
    assert found == reference_ranks(rank, rho)
    assert sum(found.values()) == rank * len(PARAMS)
    if (rank, rho) == (1, 2.0):
        assert found == {"a": 2, "b": 0}


def test_the_strength_does_not_follow_the_redistributed_rank():
    tuning = eva("*", 1, FOUND, alpha=3.0)
    trainable, frozen = tuning.init(KEY, PARAMS)
    b = jnp.ones_like(trainable["a"]["lora_b"])
    merged = tuning.merge({**trainable, "a": {**trainable["a"], "lora_b": b}}, frozen)
    np.testing.assert_allclose(merged["a"] - PARAMS["a"], 3.0 * trainable["a"]["lora_a"] @ b, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(merged["b"], PARAMS["b"])


def test_from_a_feature_pass_to_training_on_convolution_and_heads():
    kernels = {"conv": jax.random.normal(KEY, (3, 3, 2, 4)), "query": {"kernel": jax.random.normal(KEY, (4, 2, 3))}}

    def apply(params, x):
        x = jax.lax.conv_general_dilated(
            x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ).mean((1, 2))
        return jnp.einsum("bi,ihd->bhd", x, params["query"]["kernel"]).reshape(len(x), -1)

    model = interop.pure(apply, kernels)
    batch = {"inputs": RNG.normal(size=(12, 5, 5, 2)).astype(np.float32), "labels": np.arange(12) % 6}
    tuning = eva("**", 2, tj.tuning.input_moments(model, "**", [batch]), rho=1.0)
    trainable, _ = tuning.init(KEY, model.params)
    assert trainable["conv"]["lora_a"].shape == (3, 3, 2, 2)
    assert trainable["query"]["kernel"]["lora_b"].shape == (2, 2, 3)
    import optax

    tx = optax.sgd(0.1)
    step = tj.make_step(tj.objectives.cross_entropy(model.apply), tuning, tx)
    state, frozen = tj.init(KEY, model, tuning, tx)
    losses = []
    for _ in range(4):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]


def test_what_does_not_fit_is_named():
    with pytest.raises(SelectionError, match=r"eva\(\) expects rho as a number of at least 1, got 0\.5"):
        eva("*", 2, FOUND, rho=0.5)
    for other in ([], {"b": 1.0}):
        with pytest.raises(SelectionError, match=r"eva\(\) expects activations as \{path: Moments\}, got"):
            eva("b", 4, other)
    with pytest.raises(SelectionError, match=r"eva\(\) expects rank to be a whole number"):
        eva("*", 0, FOUND)
    with pytest.raises(SelectionError, match=r"eva\(\) has no activations for 'b'"):
        eva("*", 2, {"a": FOUND["a"]}).init(KEY, PARAMS)
    with pytest.raises(
        SelectionError, match=r"got activations of width 6 for 'a' \(4, 5\) float32, whose inputs are 4"
    ):
        eva("a", 2, FOUND).init(KEY, {"a": jnp.ones((4, 5))})
    with pytest.raises(SelectionError, match=r"got rank 6 for 'a' .* expected at most 5, the smaller of its widths"):
        eva("a", 6, FOUND).init(KEY, PARAMS)
    with pytest.raises(SelectionError, match=r"with 2 rows of activations: .* and fewer than the rows"):
        eva("a", 2, {"a": moments(ROWS["a"][:2])}).init(KEY, PARAMS)
