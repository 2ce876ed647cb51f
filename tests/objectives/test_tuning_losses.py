"""Losses of regularised fine-tuning, against the Transfer-Learning-Library (tests/fixtures/distill_features)."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax.objectives import losses

FIXTURE = pathlib.Path(__file__).parent.parent / "fixtures" / "distill_features" / "distill_features.npz"
CLASSES, QUEUE = 3, 4
QUEUE_LABELS = jnp.repeat(jnp.arange(CLASSES), QUEUE)
CONSTANT = np.log(QUEUE + 1)  # which the peer's divergence to a uniform distribution lacks


@pytest.fixture(scope="module")
def stored():
    return dict(np.load(FIXTURE))


def one_by_one(loss, *arrays):
    """The mean of a loss of single examples: the peer's see no other example of the batch."""
    return sum(loss(*(array[i : i + 1] for array in arrays)) for i in range(len(arrays[0]))) / len(arrays[0])


def of_classifier(x):
    ones = lambda rows: jnp.concatenate([rows, jnp.ones((len(rows), 1))], axis=1)
    kernel = jnp.concatenate([x["head"].T, x["head_bias"][None]])
    bank = {"bank": x["queue_features"], "bank_labels": QUEUE_LABELS}
    loss = lambda features, labels: losses.contrastive_cross_entropy(ones(features), labels, kernel, **bank)
    return one_by_one(loss, x["student"], x["labels"]) - CONSTANT


def of_projector(x):
    bank = {"bank": x["queue_keys"], "bank_labels": QUEUE_LABELS}
    loss = lambda queries, keys, labels: losses.categorical_contrastive(queries, keys, labels, **bank)
    return one_by_one(loss, x["student"] @ x["projector"].T, x["keys"] @ x["projector"].T, x["labels"]) - CONSTANT


def of_source_head(x):
    relation = losses.category_relation(x["source_probs"], x["all_labels"])
    return losses.co_tuning(x["source_logits"], x["labels"], relation)


PEERS = {
    "delta": ("student_map", lambda x: 6 * losses.delta(x["student_map"], x["teacher_map"])),
    "delta_attention": (
        "student_map",
        lambda x: 6 * losses.delta(x["student_map"], x["teacher_map"], x["channel_weights"]),
    ),
    "bss": ("student", lambda x: losses.bss(x["student"])),
    "bss_3": ("student", lambda x: losses.bss(x["student"], 3)),
    "co_tuning": ("source_logits", of_source_head),
    "contrastive_cross_entropy": ("student", of_classifier),
    "categorical_contrastive": ("student", of_projector),
}


@pytest.mark.parametrize("name", PEERS)
def test_values_and_gradients_are_the_peers(stored, name):
    student, loss = PEERS[name]
    x = {key: jnp.asarray(array) for key, array in stored.items() if array.dtype != np.float64}
    of_student = lambda own: loss({**x, student: own})
    value, gradient = jax.jit(jax.value_and_grad(of_student))(x[student])
    np.testing.assert_allclose(value, stored[name], rtol=1e-5)
    expected = stored[f"{name}/{student}"]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


RNG = np.random.default_rng(0)
MAP, OTHER_MAP = (jnp.asarray(RNG.normal(size=(5, 3, 3, 4)), jnp.float32) for _ in range(2))
ROWS, OTHER_ROWS, LOGITS = (jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32) for _ in range(3))
KERNEL = jnp.asarray(RNG.normal(size=(4, CLASSES)), jnp.float32)
BANK = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)
BANK_LABELS = jnp.array([0, 1, 2, 2, 1, 0])
LABELS = jnp.array([0, 1, 1, 2, 0])
WEIGHT = jnp.array([1.0, 0.0, 1.0, 0.0, 1.0])
KEPT = np.array([0, 2, 4])
ATTENTION = jnp.array([0.1, 0.2, 0.3, 0.4])
RELATION = jax.nn.softmax(jnp.asarray(RNG.normal(size=(CLASSES, 4)), jnp.float32))


def named(loss):
    """Of the contrastive losses: with the labels and the bank as arguments."""
    return lambda own, *others, labels=LABELS, **options: loss(
        own, *others, labels=labels, bank=BANK, bank_labels=BANK_LABELS, **options
    )


LOSSES = {
    "delta": (losses.delta, (MAP, OTHER_MAP), {}),
    "delta_attention": (lambda s, t, **o: losses.delta(s, t, ATTENTION, **o), (MAP, OTHER_MAP), {}),
    "bss": (lambda s, **o: losses.bss(s, 2, **o), (ROWS,), {}),
    "bss_wide": (lambda s, **o: losses.bss(s, 2, **o), (MAP.reshape(5, -1),), {}),
    "co_tuning": (lambda s, **o: losses.co_tuning(s, relation=RELATION, **o), (LOGITS,), {"labels": LABELS}),
    "contrastive_cross_entropy": (
        named(lambda s, **o: losses.contrastive_cross_entropy(s, kernel=KERNEL, **o)),
        (ROWS,),
        {"labels": LABELS},
    ),
    "categorical_contrastive": (named(losses.categorical_contrastive), (ROWS, OTHER_ROWS), {"labels": LABELS}),
}
every = pytest.mark.parametrize("name", LOSSES)


@every
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4], ids=["zeros", "equal", "large"])
def test_at_equality_the_gradient_is_finite(name, scale):
    loss, arrays, labels = LOSSES[name]
    same = [scale * arrays[0]] * len(arrays)
    value, gradient = jax.value_and_grad(loss)(*same, **labels)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    if name.startswith("delta"):
        assert value == 0 and not gradient.any()


@every
def test_a_weight_of_zero_drops_the_example_whatever_it_holds(name):
    loss, arrays, labels = LOSSES[name]
    shape = lambda array: WEIGHT.reshape(-1, *(1,) * (array.ndim - 1))
    holed = [jnp.where(shape(array) > 0, array, jnp.nan) for array in arrays]
    outside = {key: jnp.where(WEIGHT > 0, value, -1) for key, value in labels.items()}
    value, gradient = jax.jit(jax.value_and_grad(loss))(*holed, **outside, weight=WEIGHT)
    kept = [array[KEPT] for array in arrays]
    expected, slope = jax.value_and_grad(loss)(*kept, **{key: value[KEPT] for key, value in labels.items()})
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    np.testing.assert_allclose(gradient[KEPT], slope, rtol=1e-4, atol=1e-5 * np.abs(slope).max())
    assert not gradient[jnp.array([1, 3])].any()


def test_the_mean_is_weighted():
    weight = jnp.array([1.0, 0.0, 2.0, 0.0, 0.5])
    each = np.array([losses.delta(MAP[i : i + 1], OTHER_MAP[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(losses.delta(MAP, OTHER_MAP, weight=weight), (each * weight).sum() / 3.5, rtol=1e-5)
    each = np.array([losses.co_tuning(LOGITS[i : i + 1], LABELS[i : i + 1], RELATION) for i in range(5)])
    value = losses.co_tuning(LOGITS, LABELS, RELATION, weight=weight)
    np.testing.assert_allclose(value, (each * weight).sum() / 3.5, rtol=1e-5)


@every
def test_half_precision_is_computed_in_float32(name):
    loss, arrays, labels = LOSSES[name]
    half = [array.astype(jnp.bfloat16) for array in arrays]
    value, gradient = jax.value_and_grad(loss)(*half, **labels)
    assert value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    expected = loss(*(array.astype(jnp.float32) for array in half), **labels)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_no_gradient_flows_to_the_source_the_keys_and_the_bank():
    nothing = lambda loss, x: not np.any(jax.grad(loss)(x))
    assert nothing(lambda x: losses.delta(MAP, x, ATTENTION), OTHER_MAP)
    assert nothing(lambda x: losses.delta(MAP, OTHER_MAP, x), ATTENTION)
    assert nothing(lambda x: losses.co_tuning(LOGITS, LABELS, x), RELATION)
    bank = {"bank_labels": BANK_LABELS}
    assert nothing(lambda x: losses.categorical_contrastive(ROWS, x, LABELS, bank=BANK, **bank), OTHER_ROWS)
    assert nothing(lambda x: losses.categorical_contrastive(ROWS, OTHER_ROWS, LABELS, bank=x, **bank), BANK)
    assert nothing(lambda x: losses.contrastive_cross_entropy(ROWS, LABELS, KERNEL, bank=x, **bank), BANK)
    assert not nothing(lambda x: losses.contrastive_cross_entropy(ROWS, LABELS, x), KERNEL)  # the classifier learns


def test_attention_is_the_softmax_of_the_standardised_growth_of_the_loss():
    increases = np.array([0.3, -0.1, 0.9, 0.2])
    scores = np.exp((increases - increases.mean()) / increases.std() / 5)
    np.testing.assert_allclose(losses.channel_attention(jnp.asarray(increases)), scores / scores.sum(), rtol=1e-6)
    np.testing.assert_allclose(losses.channel_attention(jnp.zeros(4)), np.full(4, 0.25))


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_bss_sums_the_smallest_squared_singular_values(shape, k):
    features = np.random.default_rng(1).normal(size=shape) * np.geomspace(1, 30, shape[1])
    u, values, v = np.linalg.svd(features, full_matrices=False)
    value, gradient = jax.value_and_grad(losses.bss)(jnp.asarray(features, jnp.float32), k)
    np.testing.assert_allclose(value, (values[-k:] ** 2).sum(), rtol=1e-4)
    expected = 2 * (u[:, -k:] * values[-k:]) @ v[-k:]
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_bss_of_repeated_singular_values_has_a_finite_gradient():
    value, gradient = jax.value_and_grad(losses.bss)(2 * jnp.eye(4), 2)
    assert value == 8.0 and np.isfinite(gradient).all()
    np.testing.assert_allclose(jnp.sum(gradient**2), 32.0, rtol=1e-5)  # 2 F v v' of two directions, F = 2


@pytest.mark.parametrize("kept", [6, 4, 2, 1])
def test_bss_leaves_out_examples_of_weight_zero(kept):
    features = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)
    weight = (jnp.arange(6) < kept).astype(jnp.float32)
    expected = losses.bss(features[:kept])
    np.testing.assert_allclose(losses.bss(features, weight=weight), expected, rtol=1e-4)


def test_the_relation_is_the_mean_prediction_of_each_class(stored):
    probs, labels = stored["source_probs"].astype(np.float64), stored["all_labels"]
    expected = np.stack([probs[labels == label].mean(0) for label in range(CLASSES)])
    relation = losses.category_relation(jnp.asarray(probs, jnp.float32), jnp.asarray(labels), num_classes=CLASSES)
    np.testing.assert_allclose(relation, expected, rtol=1e-6)
    np.testing.assert_allclose(relation.sum(1), 1, rtol=1e-6)


def contrast(queries, keys, labels, key_labels, temperature):
    """The mean over queries of the mean over keys of their label of -log softmax, in float64."""
    unit = lambda rows: np.asarray(rows, np.float64) / np.linalg.norm(np.asarray(rows, np.float64), axis=1)[:, None]
    scores = unit(queries) @ unit(keys).T / temperature
    logs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    return -np.mean([row[np.asarray(key_labels) == label].mean() for row, label in zip(logs, np.asarray(labels))])


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_contrastive_losses_see_the_batch_and_the_bank(temperature):
    everyone = np.concatenate([LABELS, BANK_LABELS])
    bank = {"bank": BANK, "bank_labels": BANK_LABELS}
    value = losses.categorical_contrastive(ROWS, OTHER_ROWS, LABELS, temperature, **bank)
    expected = contrast(ROWS, np.concatenate([OTHER_ROWS, BANK]), LABELS, everyone, temperature)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    value = losses.contrastive_cross_entropy(ROWS, LABELS, KERNEL, temperature, **bank)
    expected = contrast(KERNEL.T[LABELS], np.concatenate([ROWS, BANK]), LABELS, everyone, temperature)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_contrastive_losses_do_without_a_bank():
    value = losses.categorical_contrastive(ROWS, OTHER_ROWS, LABELS)
    np.testing.assert_allclose(value, contrast(ROWS, OTHER_ROWS, LABELS, LABELS, 0.07), rtol=1e-5)
    value = losses.contrastive_cross_entropy(ROWS, LABELS, KERNEL)
    np.testing.assert_allclose(value, contrast(KERNEL.T[LABELS], ROWS, LABELS, LABELS, 0.07), rtol=1e-5)


def test_a_label_outside_the_classes_is_loud():
    outside = LABELS.at[1].set(CLASSES)
    assert np.isnan(losses.co_tuning(LOGITS, outside, RELATION))
    assert np.isnan(losses.co_tuning(LOGITS, LABELS.at[1].set(-1), RELATION))
    assert np.isnan(losses.contrastive_cross_entropy(ROWS, outside, KERNEL))


def test_errors_of_delta():
    with pytest.raises(tj.DataError, match=r"delta\(\) got channel_weights \(3,\) float32 for 4 channels. Expect"):
        losses.delta(MAP, OTHER_MAP, jnp.ones(3))
    with pytest.raises(tj.DataError, match=r"delta\(\) got .* Expected one row per example and the same positions"):
        losses.delta(MAP, OTHER_MAP[:, :2])
    with pytest.raises(tj.DataError, match=r"channel_attention\(\) got increases \(2, 2\) float32. Expected \[c\]"):
        losses.channel_attention(jnp.ones((2, 2)))


@pytest.mark.parametrize("k", [0, 5, 1.0])
def test_bss_wants_a_number_of_singular_values(k):
    with pytest.raises(tj.TransferError, match=r"bss\(\) expects k from 1 to 4, the number of singular values of \[5,"):
        losses.bss(ROWS, k)


def test_errors_of_bss():
    with pytest.raises(tj.DataError, match=r"bss\(\) got features \(5, 3, 3, 4\) float32. Expected \[B, d\]: pool or"):
        losses.bss(MAP)
    with pytest.raises(tj.DataError, match=r"bss\(\) got weight \(3,\) float32. Expected one per example, \(5,\)"):
        losses.bss(ROWS, weight=jnp.ones(3))


SOFT = np.array([[0.5, 0.5], [1.0, 0.0], [0.2, 0.8]])


@pytest.mark.parametrize(
    ("probs", "labels", "options", "message"),
    [
        (
            SOFT,
            np.array([0, 1]),
            {},
            r"got source_probs \(3, 2\) float64 and labels \(2,\) int64. Expected \[N",
        ),
        (SOFT, np.array([0.0, 1.0, 1.0]), {}, r"and labels \(3,\) float64. Expected \[N, Cs\] and \[N\] integers"),
        (
            3 * SOFT,
            np.array([0, 1, 1]),
            {},
            r"got rows of source_probs that are no distributions. Expected jax",
        ),
        (SOFT - 1, np.array([0, 1, 1]), {}, r"source_probs that are no distributions"),
        (SOFT, np.array([0, -1, 1]), {}, r"category_relation\(\) got labels from -1 to 1. Expected 0 to 1"),
        (SOFT, np.array([0, 1, 2]), {"num_classes": 2}, r"got labels from 0 to 2. Expected 0 to 1"),
        (SOFT, np.array([0, 2, 2]), {"num_classes": 4}, r"got no example of class 1, 3. Expected one of each at least"),
    ],
)
def test_errors_of_category_relation(probs, labels, options, message):
    with pytest.raises(tj.DataError, match=message):
        losses.category_relation(probs, labels, **options)


def test_errors_of_co_tuning():
    with pytest.raises(tj.DataError, match=r"co_tuning\(\) got relation \(3, 2\) float32 for source logits \(5, 4\)"):
        losses.co_tuning(LOGITS, LABELS, jnp.ones((3, 2)))
    with pytest.raises(tj.DataError, match=r"co_tuning\(\) got labels \(5,\) float32. Expected integers \(5,\)"):
        losses.co_tuning(LOGITS, LABELS.astype(jnp.float32), RELATION)
    with pytest.raises(tj.DataError, match=r"co_tuning\(\) got logits .* Expected \[N, C\], one row per example"):
        losses.co_tuning(LOGITS[0], LABELS, RELATION)


def test_errors_of_bi_tuning():
    both = r"\(\) got one of bank and bank_labels. Expected both, or neither"
    with pytest.raises(tj.DataError, match=r"contrastive_cross_entropy" + both):
        losses.contrastive_cross_entropy(ROWS, LABELS, KERNEL, bank=BANK)
    with pytest.raises(tj.DataError, match=r"categorical_contrastive" + both):
        losses.categorical_contrastive(ROWS, OTHER_ROWS, LABELS, bank_labels=BANK_LABELS)
    with pytest.raises(tj.DataError, match=r"got features \(5, 4\) float32 and a kernel \(3, 4\) float32. Expected"):
        losses.contrastive_cross_entropy(ROWS, LABELS, KERNEL.T)
    with pytest.raises(tj.DataError, match=r"got queries \(5, 4\) float32 and keys \(6, 4\) float32. Expected \[B"):
        losses.categorical_contrastive(ROWS, BANK, LABELS)
    with pytest.raises(tj.DataError, match=r"got bank \(6, 3\) float32. Expected \[M, 4\], as wide as the embeddings"):
        losses.categorical_contrastive(ROWS, ROWS, LABELS, bank=BANK[:, :3], bank_labels=BANK_LABELS)
    with pytest.raises(tj.DataError, match=r"got bank_labels \(5,\) int32. Expected integers \(6,\), one per"):
        losses.categorical_contrastive(ROWS, ROWS, LABELS, bank=BANK, bank_labels=LABELS)
