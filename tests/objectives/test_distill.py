"""Distillation as an objective: teachers, capture points, projectors, what is missing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax import DataError, SelectionError, TransferError

ob, losses = tj.objectives, tj.objectives.losses
RNG = np.random.default_rng(1)
BATCH = {
    "inputs": RNG.normal(size=(6, 3)).astype(np.float32),
    "labels": np.array([0, 1, 2, 0, 1, 2]),
    "id": np.arange(6),
}


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape).astype(np.float32))


def network(params, x):
    body = tj.interop.mark("body", jnp.tanh(x @ params["body"]))
    return tj.interop.mark("neck", jnp.tanh(body @ params["neck"])) @ params["head"]


def deep(params, x):
    return tj.interop.mark("late", jnp.tanh(x @ params["late"])) @ params["head"]


@pytest.fixture
def student():
    return tj.interop.pure(network, {"body": draw(3, 4), "neck": draw(4, 4), "head": draw(4, 3)})


@pytest.fixture
def teacher():
    return tj.interop.pure(deep, {"late": draw(3, 8), "head": draw(8, 3)})


def value(objective, model, batch=BATCH):
    return objective(model.params, model.extra, batch, None, False)


def test_plain_distillation_is_the_loss_of_the_outputs(student, teacher):
    kd = functools.partial(losses.kd, temperature=2.0)
    found = value(ob.distill(student, teacher, kd), student)
    outputs = [model.apply(model.params, {}, BATCH["inputs"])[0] for model in (student, teacher)]
    np.testing.assert_allclose(found.value, losses.kd(*outputs, temperature=2.0), rtol=1e-6)
    same = np.mean(np.argmax(outputs[0], -1) == np.argmax(outputs[1], -1))
    np.testing.assert_allclose(found.metrics["agreement"], same, rtol=1e-6)
    both = value(
        ob.distill(student, teacher, kd, supervised=ob.cross_entropy, weight=0.9, supervised_weight=0.1), student
    )
    task = value(ob.cross_entropy(student.apply), student)
    np.testing.assert_allclose(both.value, 0.1 * task.value + 0.9 * found.value, rtol=1e-6)
    assert set(both.metrics) == {"accuracy", "distillation", "agreement"}


def test_a_loss_gets_labels_and_weights_by_the_names_of_its_arguments(student, teacher):
    weighted = {**BATCH, "weight": np.array([1, 0, 2, 0, 0, 1], np.float32)}
    seen = {}

    def loss(mine, theirs, labels, *, weight=None, other="default"):
        seen.update(labels=labels, weight=weight, other=other)
        return jnp.zeros(())

    value(ob.distill(student, teacher, loss), student, weighted)
    assert seen["other"] == "default"
    np.testing.assert_array_equal(seen["weight"], weighted["weight"])
    np.testing.assert_array_equal(seen["labels"], BATCH["labels"])
    with pytest.raises(DataError, match="the batch has no 'labels', which the loss takes"):
        value(ob.distill(student, teacher, losses.dkd), student, {"inputs": BATCH["inputs"]})


def test_features_of_unlike_layers_are_compared_through_a_projector(student, teacher):
    student = tj.extend(student, "wide", ob.projector(4, 8), key=jax.random.key(0))
    objective = ob.distill(student, teacher, losses.hint, {"body": "late"}, project="wide")
    weights = student.params["aux"]["wide"]
    mine = np.tanh(BATCH["inputs"] @ np.asarray(student.params["model"]["body"])) @ weights["kernel"] + weights["bias"]
    theirs = np.tanh(BATCH["inputs"] @ np.asarray(teacher.params["late"]))
    np.testing.assert_allclose(value(objective, student).value, np.mean((mine - theirs) ** 2), rtol=1e-5)
    gradient = jax.grad(lambda p: objective(p, {}, BATCH, None, True).value)(student.params)
    assert float(jnp.abs(gradient["aux"]["wide"]["kernel"]).max()) > 0


def test_each_of_several_pairs_has_its_projector_and_losses_add_up(student, teacher):
    for name in ("one", "two"):
        student = tj.extend(student, name, ob.projector(4, 8), key=jax.random.key(len(name)))
    pair = lambda at, project: value(ob.distill(student, teacher, losses.hint, at, project=project), student).value
    both = pair({"body": "late", "neck": "late"}, {"body": "one", "neck": "two"})
    np.testing.assert_allclose(both, pair({"body": "late"}, "one") + pair({"neck": "late"}, "two"), rtol=1e-6)


def test_variances_are_auxiliary_weights_that_the_loss_names(student, teacher):
    student = tj.extend(student, "wide", ob.projector(4, 8, variance=True), key=jax.random.key(0))
    objective = ob.distill(student, teacher, losses.vid, {"body": "late"}, project="wide")
    gradient = jax.grad(lambda p: objective(p, {}, BATCH, None, True).value)(student.params)
    assert float(jnp.abs(gradient["aux"]["wide"]["raw_variance"]).max()) > 0
    np.testing.assert_allclose(jax.nn.softplus(student.params["aux"]["wide"]["raw_variance"]), 5, rtol=1e-5)


def test_layers_of_one_name_need_no_pairs(student):
    other = student._replace(params=jax.tree.map(lambda leaf: leaf + 0.1, student.params))
    found = value(ob.distill(student, other, losses.hint, "*"), student).value
    parts = [value(ob.distill(student, other, losses.hint, at), student).value for at in ("body", "neck")]
    np.testing.assert_allclose(found, sum(parts), rtol=1e-6)


def test_several_teachers_are_weighted(student, teacher):
    other = teacher._replace(params=jax.tree.map(lambda leaf: -leaf, teacher.params))
    one, two = (value(ob.distill(student, t, losses.kd), student).value for t in (teacher, other))
    mean = value(ob.distill(student, [teacher, other], losses.kd), student).value
    np.testing.assert_allclose(mean, (one + two) / 2, rtol=1e-6)
    found = value(ob.distill(student, [teacher, other], losses.kd, teacher_weights=(0.25, 0.75)), student).value
    np.testing.assert_allclose(found, 0.25 * one + 0.75 * two, rtol=1e-6)


def test_no_gradient_reaches_the_teacher_and_a_step_leaves_it_alone(student, teacher):
    objective = ob.distill(student, teacher, losses.kd)
    assert any(leaf is teacher.params["late"] for leaf in jax.tree.leaves(objective))
    gradient = jax.grad(lambda o: o(student.params, {}, BATCH, None, True).value, allow_int=True)(objective)
    own = [jnp.abs(leaf).max() for leaf in jax.tree.leaves(gradient) if jnp.ndim(leaf) == 2]
    assert own and max(own) == 0
    tuning, tx = tj.full(), optax.adam(0.05)
    state, frozen = tj.init(jax.random.key(0), student, tuning, tx)
    step = tj.make_step(objective, tuning, tx)
    values = []
    for _ in range(30):
        state, metrics = step(state, frozen, BATCH)
        values.append(float(metrics["loss"]))
    assert values[-1] < 0.2 * values[0]


def test_a_frozen_teacher_is_hoisted(student, teacher):
    objective = ob.distill(student, teacher, losses.kd, supervised=ob.cross_entropy)
    tuning, tx = tj.train("head"), optax.sgd(0.1)
    state, frozen = tj.init(jax.random.key(0), student, tuning, tx)
    step = tj.make_step(objective, tuning, tx)
    hoisted = tj.hoist(step, state, frozen, BATCH)
    rows = hoisted.prefix(frozen, state.extra, step.objective, BATCH)
    text = str(
        jax.make_jaxpr(lambda s, r: hoisted.suffix(s.trainable, frozen, s.extra, step.objective, r, s.key))(state, rows)
    )
    assert text.count("dot_general") == 1  # the head's: the teacher and the student's body are computed once
    plain = tj.init(jax.random.key(0), student, tuning, tx)[0]
    one, _ = step(plain, frozen, BATCH)
    cache = tj.io.residual_cache(hoisted, state, frozen)
    other = next(iter(tj.fit(step, state, frozen, [BATCH], cache=cache)))[0]
    np.testing.assert_allclose(one.trainable["head"], other.trainable["head"], rtol=1e-6)


def test_a_generation_can_teach_the_next(student):
    kd = functools.partial(losses.kd, temperature=1.0)
    reborn = student._replace(params=jax.tree.map(lambda leaf: leaf[::-1] * 0.5, student.params))
    objective = ob.distill(reborn, student, kd)
    assert value(objective, reborn).value > 0 and value(ob.distill(student, student, kd), student).value == 0


def test_what_a_teacher_said_comes_with_the_batch(student, teacher):
    objective = ob.distill(student, None, losses.kd)
    outputs = teacher.apply(teacher.params, {}, BATCH["inputs"])[0]
    found = value(objective, student, {**BATCH, "teacher": {"outputs": outputs}}).value
    np.testing.assert_allclose(found, value(ob.distill(student, teacher, losses.kd), student).value, rtol=1e-6)
    with pytest.raises(DataError, match=r"the batch has no .teacher.*TeacherCache"):
        value(objective, student)


def test_what_does_not_fit_says_what_to_write(student, teacher):
    with pytest.raises(TransferError, match=r"distill\(\) expects a Model that can say"):
        ob.distill(student.params, teacher, losses.kd)
    with pytest.raises(TransferError, match=r"distill\(\) expects a teacher second, got str"):
        ob.distill(student, "teacher", losses.kd)
    with pytest.raises(TransferError, match=r"distill\(\) expects a loss \(student, teacher\) third"):
        ob.distill(student, teacher, teacher)
    with pytest.raises(SelectionError, match=r"the model has no auxiliary weights .wide.*tj.extend"):
        ob.distill(student, teacher, losses.hint, {"body": "late"}, project="wide")
    with pytest.raises(SelectionError, match=r"distill\(\) got at=.*expected \{student's path: teacher's path\}"):
        ob.distill(student, teacher, losses.hint, {"body": 3})
    with pytest.raises(TransferError, match=r"distill\(\) got project=3"):
        ob.distill(student, teacher, losses.hint, project=3)
    wide = tj.extend(student, "wide", ob.projector(4, 8), key=jax.random.key(0))
    with pytest.raises(SelectionError, match="project names neck, which at does not: body"):
        ob.distill(wide, teacher, losses.hint, {"body": "late"}, project={"neck": "wide"})
    with pytest.raises(TransferError, match=r"distill\(\) got teacher_weights for one teacher"):
        ob.distill(student, teacher, losses.kd, teacher_weights=(1.0,))
    with pytest.raises(TransferError, match=r"distill\(\) got 1 teacher_weights for 2 teachers"):
        ob.distill(student, [teacher, teacher], losses.kd, teacher_weights=(1.0,))
    with pytest.raises(TransferError, match=r"distill\(\) got teacher_weights that sum to 1.5; expected 1"):
        ob.distill(student, [teacher, teacher], losses.kd, teacher_weights=(1.0, 0.5))
    with pytest.raises(TransferError, match=r"projector\(\) expects widths of at least 1, got 0 and 4"):
        ob.projector(0, 4)


def test_networks_that_do_not_fit_say_where(student, teacher):
    with pytest.raises(SelectionError, match="at selects body, neck of the student and late of the teacher"):
        value(ob.distill(student, teacher, losses.hint, "*"), student)
    with pytest.raises(DataError, match=r"projector"):
        value(ob.distill(student, teacher, losses.hint, {"body": "late"}), student)
    said = {**BATCH, "teacher": {"outputs": np.zeros((6, 3), np.float32)}}
    with pytest.raises(SelectionError, match="the teacher has no 'late' to compare: it has outputs"):
        value(ob.distill(student, None, losses.hint, {"body": "late"}), student, said)
    narrow = tj.extend(student, "wide", ob.projector(4, 5), key=jax.random.key(0))
    with pytest.raises(DataError, match=r"the projector 'wide' maps width 4 to 5.*projector\(4, 8\)"):
        value(ob.distill(narrow, teacher, losses.hint, {"body": "late"}, project="wide"), narrow)
    strange = tj.extend(student, "wide", jnp.zeros(3))
    with pytest.raises(DataError, match="the auxiliary weights 'wide' are no projector"):
        value(ob.distill(strange, teacher, losses.hint, {"body": "late"}, project="wide"), strange)


def test_a_loss_of_ones_own_must_fit(student, teacher):
    weighted = {**BATCH, "weight": np.ones(6, np.float32)}
    unweighted = lambda mine, theirs: jnp.mean((mine - theirs) ** 2)
    with pytest.raises(DataError, match="the batch has a 'weight' for each example, which the loss does not take"):
        value(ob.distill(student, teacher, unweighted), student, weighted)
    assert value(ob.distill(student, teacher, unweighted), student).value > 0
    fixed = functools.partial(losses.kd, weight=np.ones(6, np.float32))  # its own weights
    assert value(ob.distill(student, teacher, fixed), student, weighted).value > 0
    with pytest.raises(DataError, match=r"the loss takes confidence, which nothing gives.*functools.partial"):
        value(ob.distill(student, teacher, lambda s, t, confidence: jnp.mean(s)), student)
    plain = tj.extend(student, "wide", ob.projector(4, 8), key=jax.random.key(0))
    with pytest.raises(DataError, match=r"the loss takes raw_variance.*variance=True"):
        value(ob.distill(plain, teacher, losses.vid, {"body": "late"}, project="wide"), plain)
    for wrong in (lambda s, t: s - t, lambda s, t: (jnp.mean(s), {})):
        with pytest.raises(DataError, match=r"the loss returned .*; expected a scalar, the mean over examples"):
            value(ob.distill(student, teacher, wrong), student)
    with pytest.raises(TransferError, match="got an empty list: a Model, several, or None"):
        ob.distill(student, [], losses.kd)
    said = {**BATCH, "teacher": {"outputs": np.zeros((6, 3), np.float32)}}
    with pytest.raises(SelectionError, match=r"at selects body of the student and nothing of the.*at=\.\.\."):
        value(ob.distill(student, None, losses.hint, "body"), student, said)


def test_teachers_of_other_classes_are_refused_with_the_losses_that_still_work(student):
    other = tj.interop.pure(lambda params, x: x @ params["head"], {"head": draw(3, 7)})
    with pytest.raises(DataError, match="rkd_distance"):
        value(ob.distill(student, other, losses.kd), student)


@pytest.fixture
def averaged(student):
    return ob.with_teacher(student)


def test_a_mean_teacher_follows_the_student(averaged):
    objective = ob.mean_teacher(averaged, losses.kd, decay=0.5, supervised=ob.cross_entropy)
    tuning, tx = tj.full(), optax.sgd(0.5)
    state, frozen = tj.init(jax.random.key(0), averaged, tuning, tx)
    step = tj.make_step(objective, tuning, tx)
    expected = np.asarray(averaged.params["head"])
    for number in range(4):
        decay = min(0.5, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * np.asarray(state.trainable["head"])
        state, metrics = step(state, frozen, BATCH)
    np.testing.assert_allclose(state.extra["teacher"]["params"]["head"], expected, rtol=1e-5)
    assert metrics["distillation"] > 0


def test_a_mean_teacher_compares_layers_too_and_rests_in_evaluation(averaged):
    objective = ob.mean_teacher(averaged, losses.hint, "body")
    moved = {**averaged.params, "body": averaged.params["body"] + 0.1}
    loss = objective(moved, averaged.extra, BATCH, None, False)
    assert loss.value > 0
    np.testing.assert_array_equal(loss.extra["teacher"]["params"]["body"], averaged.params["body"])


def test_a_mean_teacher_needs_its_model(student, averaged):
    with pytest.raises(
        TransferError, match=r"mean_teacher\(\) expects a Model with its teacher.*with_teacher\(model\)"
    ):
        ob.mean_teacher(student, losses.kd)
    with pytest.raises(TransferError, match=r"mean_teacher\(\) expects a decay in \[0, 1\), got 1.0"):
        ob.mean_teacher(averaged, losses.kd, decay=1.0)
    with pytest.raises(TransferError, match=r"with_teacher\(\) expects a Model, got"):
        ob.with_teacher(student.params)
    with pytest.raises(DataError, match="extra has no 'teacher'"):
        ob.mean_teacher(averaged, losses.kd)(student.params, {}, BATCH, None, True)
