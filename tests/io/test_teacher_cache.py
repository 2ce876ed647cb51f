"""What a teacher says is kept by example and augmentation, and comes again bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax import CheckpointError, DataError, TransferError

losses = tj.objectives.losses
RNG = np.random.default_rng(2)
IMAGES = RNG.integers(0, 256, (8, 6, 6, 1)).astype(np.uint8)
LABELS = np.arange(8) % 3
calls = []


def network(params, x):
    jax.debug.callback(lambda: calls.append(1))
    body = tj.interop.mark("body", (x.astype(jnp.float32) / 255).reshape(len(x), -1) @ params["body"])
    return body @ params["head"]


@pytest.fixture
def teacher():
    draw = lambda *shape: jnp.asarray(RNG.normal(size=shape).astype(np.float32))
    return tj.interop.pure(network, {"body": draw(36, 5), "head": draw(5, 7)})


def batches(order=range(8), size=4, **more):
    order = np.array(list(order))
    return [
        {"inputs": IMAGES[rows], "labels": LABELS[rows], "id": rows.astype(np.int64), **more}
        for rows in np.split(order, len(order) // size)
    ]


def outputs(cache, given):
    return [np.asarray(batch["teacher"]["outputs"]) for batch in cache.taught(given)]


def count(function):
    calls.clear()
    found = function()
    jax.effects_barrier()
    return found, len(calls)


def test_a_second_epoch_in_another_order_computes_nothing_and_says_the_same(teacher):
    cache = tj.io.TeacherCache(teacher)
    first, passes = count(lambda: np.concatenate(outputs(cache, batches())))
    assert passes == 2
    order = RNG.permutation(8)
    second, passes = count(lambda: np.concatenate(outputs(cache, batches(order))))
    assert passes == 0
    np.testing.assert_array_equal(second, first[order])
    np.testing.assert_allclose(first, teacher.apply(teacher.params, {}, IMAGES)[0], rtol=1e-5, atol=1e-5)


def test_the_rest_of_the_batch_comes_along_and_features_are_kept(teacher):
    cache = tj.io.TeacherCache(teacher, at="body")
    (batch,) = cache.taught(batches(size=8))
    np.testing.assert_array_equal(batch["labels"], LABELS)
    np.testing.assert_array_equal(batch["inputs"], IMAGES)
    assert set(batch["teacher"]) == {"body", "outputs"} and batch["teacher"]["body"].shape == (8, 5)
    assert "body" in {row[0] for row in cache.report().rows} and cache.report().metadata["variants"] == 1


def test_each_variant_is_computed_once_and_student_and_teacher_see_the_same_pixels(teacher):
    augment = tj.data.compose(tj.data.random_flip(), tj.data.random_crop(2))
    cache = tj.io.TeacherCache(teacher, augment=augment, variants=3, seed=5)
    epochs, passes = count(lambda: [list(cache.taught(batches())) for _ in range(6)])
    assert passes == 6  # two batches of each of the three variants
    for epoch, again in zip(epochs[:3], epochs[3:]):
        for one, other in zip(epoch, again):
            np.testing.assert_array_equal(one["inputs"], other["inputs"])
            np.testing.assert_array_equal(one["teacher"]["outputs"], other["teacher"]["outputs"])
            np.testing.assert_allclose(
                teacher.apply(teacher.params, {}, one["inputs"])[0], one["teacher"]["outputs"], rtol=1e-5, atol=1e-5
            )
    assert not np.array_equal(epochs[0][0]["inputs"], epochs[1][0]["inputs"])


def test_the_batch_can_say_which_epoch_it_is_and_borders_may_lie_inside_of_batches(teacher):
    make = lambda: tj.io.TeacherCache(teacher, augment=tj.data.random_crop(2), variants=4)
    told = [list(make().taught(batches(epoch=epoch))) for epoch in (0, 1, 5)]
    np.testing.assert_array_equal(told[1][0]["inputs"], told[2][0]["inputs"])
    cache = make()
    stream = [*range(6), 6, 7, *range(8)]  # batches of 4 and of 16: the second has examples of both epochs
    mixed = next(iter(cache.taught(batches(stream, 16))))["inputs"]
    np.testing.assert_array_equal(mixed[:8], np.concatenate([np.asarray(b["inputs"]) for b in told[0]]))
    np.testing.assert_array_equal(mixed[8:], mixed[:8])  # met together: the same number of times
    later = next(iter(cache.taught(batches(range(4), 4))))["inputs"]
    np.testing.assert_array_equal(later, np.asarray(told[1][0]["inputs"]))


def test_the_best_logits_and_the_weight_of_the_rest_are_enough_for_kd(teacher):
    student = jnp.asarray(RNG.normal(size=(8, 7)).astype(np.float32))
    (whole,) = tj.io.TeacherCache(teacher).taught(batches(size=8))
    for k in (3, 7):
        (batch,) = tj.io.TeacherCache(teacher, top_k=k, temperature=2.0).taught(batches(size=8))
        kept = batch["teacher"]["outputs"]
        assert kept.values.shape == (8, k)
        wanted = losses.kd(student, losses.top_k(whole["teacher"]["outputs"], k, 2.0), 2.0)
        np.testing.assert_allclose(losses.kd(student, kept, 2.0), wanted, rtol=1e-6)
    np.testing.assert_allclose(
        losses.kd(student, kept, 2.0), losses.kd(student, whole["teacher"]["outputs"], 2.0), rtol=1e-4
    )


def test_a_folder_is_gone_on_with_and_bound_to_teacher_and_augmentation(teacher, tmp_path):
    flip, crop = tj.data.random_flip(), tj.data.random_crop(1)
    first = outputs(tj.io.TeacherCache(teacher, tmp_path / "said", augment=flip, variants=2), batches())
    again = tj.io.TeacherCache(teacher, tmp_path / "said", augment=flip, variants=2)
    second, passes = count(lambda: outputs(again, batches()))
    assert passes == 0
    np.testing.assert_array_equal(np.concatenate(second), np.concatenate(first))
    other = teacher._replace(params=jax.tree.map(lambda leaf: leaf + 1, teacher.params))
    with pytest.raises(CheckpointError, match="weights"):
        outputs(tj.io.TeacherCache(other, tmp_path / "said", augment=flip, variants=2), batches())
    with pytest.raises(CheckpointError, match="preprocessing"):
        outputs(tj.io.TeacherCache(teacher, tmp_path / "said", augment=crop, variants=2), batches())


def test_an_augmentation_is_known_by_its_program_not_by_its_name(teacher, tmp_path):
    def scaled(factor):
        def augment(batch, key):
            return {**batch, "inputs": (batch["inputs"] * factor).astype(batch["inputs"].dtype)}

        return augment

    made = lambda factor: tj.io.TeacherCache(teacher, tmp_path / "said", augment=scaled(factor), variants=2)
    first = outputs(made(0.5), batches())
    again, passes = count(lambda: outputs(made(0.5), batches()))
    assert passes == 0
    np.testing.assert_array_equal(np.concatenate(again), np.concatenate(first))
    with pytest.raises(CheckpointError, match="preprocessing"):
        outputs(made(0.25), batches())


def test_an_id_stands_for_one_example(teacher):
    cache = tj.io.TeacherCache(teacher)
    (batch,) = batches(size=8)
    other = {**batch, "inputs": batch["inputs"][::-1]}
    with pytest.raises(DataError, match=r"example 0 came with other inputs.*ids that are unique over all sources"):
        list(cache.taught([batch, other]))
    with pytest.raises(DataError, match="a batch has 'teacher' already, from another TeacherCache"):
        list(cache.taught(tj.io.TeacherCache(teacher).taught([batch])))


def test_the_best_logits_are_for_one_temperature(teacher):
    student = jnp.zeros((8, 7))
    (batch,) = tj.io.TeacherCache(teacher, top_k=3, temperature=2.0).taught(batches(size=8))
    kept = batch["teacher"]["outputs"]
    with pytest.raises(TransferError, match=r"kd\(\) got temperature=4 and a TopK for 2"):
        jax.jit(lambda student, kept: losses.kd(student, kept, 4.0))(student, kept)
    assert losses.kd(student, kept, jnp.float32(2.0)) == losses.kd(student, kept, 2.0)
    with pytest.raises(TransferError, match=r"kd\(\) expects a number as temperature, got '4'"):
        losses.kd(student, student, "4")


def test_a_student_learns_from_it_as_from_the_teacher(teacher):
    student = tj.interop.pure(lambda p, x: (x.astype(jnp.float32) / 255).reshape(len(x), -1) @ p, jnp.zeros((36, 7)))
    kd, tuning, tx = functools.partial(losses.kd, temperature=2.0), tj.full(), optax.sgd(0.1)
    results = []
    for objective, given in (
        (tj.objectives.distill(student, teacher, kd), batches()),
        (tj.objectives.distill(student, None, kd), tj.io.TeacherCache(teacher).taught(batches())),
    ):
        state, frozen = tj.init(jax.random.key(0), student, tuning, tx)
        step = tj.make_step(objective, tuning, tx)
        for state, _ in tj.fit(step, state, frozen, given):
            pass
        results.append(jax.tree.leaves(state.trainable))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)


def test_augmentations_that_mix_examples_are_refused(teacher):
    cache = tj.io.TeacherCache(teacher, augment=tj.data.mixup(num_classes=3), variants=2)
    with pytest.raises(DataError, match="mixes examples of a batch"):
        list(cache.taught(batches()))


def test_bad_arguments_say_what_to_write(teacher):
    with pytest.raises(TransferError, match=r"TeacherCache\(\) expects a Model that can say"):
        tj.io.TeacherCache(teacher.params)
    with pytest.raises(TransferError, match=r"TeacherCache\(\) expects variants, a whole number of at least 1, got 0"):
        tj.io.TeacherCache(teacher, variants=0)
    with pytest.raises(TransferError, match=r"TeacherCache\(\) got 2 variants and no augment="):
        tj.io.TeacherCache(teacher, variants=2)
    with pytest.raises(TransferError, match=r"TeacherCache\(\) got top_k=3 and temperature=None"):
        tj.io.TeacherCache(teacher, top_k=3)
    with pytest.raises(DataError, match="expected a dict with 'inputs' and 'id'"):
        list(tj.io.TeacherCache(teacher).taught([{"inputs": IMAGES}]))
    with pytest.raises(DataError, match="this TeacherCache has seen no batch"):
        tj.io.TeacherCache(teacher).report()
    named = tj.interop.pure(lambda params, x: {"a": x * params["s"]}, {"s": jnp.ones(())})
    with pytest.raises(TransferError, match="top_k is of one array of logits; the teacher's outputs are"):
        list(tj.io.TeacherCache(named, top_k=1, temperature=1.0).taught(batches()))


def test_outputs_with_names_keep_them(teacher):
    named = tj.interop.pure(lambda params, x: {"a": x[:, 0, 0] * params["s"], "b": x[:, 0, 0]}, {"s": jnp.ones(())})
    (batch,) = tj.io.TeacherCache(named).taught(batches(size=8))
    assert set(batch["teacher"]["outputs"]) == {"a", "b"}
