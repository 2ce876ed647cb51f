"""The laws of a Model, for a Flax NNX module, a Flax Linen module and a plain function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transferjax import interop
from transferjax._errors import SelectionError
from transferjax.tree import paths, split, training_selector

MODULES = ("bn", "conv", "dropout", "head")


def same(a, b):
    """Which leaves are bit-identical, by path."""
    return {
        path: np.array_equal(np.asarray(leaf), np.asarray(other))
        for (path, leaf), other in zip(paths(a).items(), paths(b).values(), strict=True)
    }


def moved(extra, model):
    return {path for path, equal in same(extra, model.extra).items() if not equal}


STATISTICS = {"bn/mean", "bn/var"}


def test_params_and_extra_are_nested_dicts_with_clean_names(model):
    assert set(paths(model.params)) == {
        "conv/kernel", "conv/bias", "bn/scale", "bn/bias", "head/kernel", "head/bias"
    }  # fmt: skip
    assert set(paths(model.extra)) == STATISTICS


def test_inference_mode_moves_nothing_and_needs_no_key(model, x):
    outputs, extra = model.apply(model.params, model.extra, x)
    again, _ = model.apply(model.params, model.extra, x)
    assert outputs.shape == (4, 5)
    assert not moved(extra, model)
    assert np.array_equal(outputs, again)


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        (True, STATISTICS),
        ("**", STATISTICS),
        ("bn", STATISTICS),
        ("head", set()),
        ("dropout", set()),
        ("{conv,dropout}", set()),
    ],
)
def test_only_selected_modules_move_their_statistics(model, x, key, train, expected):
    _, extra = model.apply(model.params, model.extra, x, key=key, train=train)
    assert moved(extra, model) == expected
    assert jax.tree.structure(extra) == jax.tree.structure(model.extra)


@pytest.mark.parametrize(("train", "random"), [(False, False), ("bn", False), ("dropout", True), (True, True)])
def test_only_selected_dropout_is_random(model, x, key, train, random):
    one, _ = model.apply(model.params, model.extra, x, key=key, train=train)
    same_key, _ = model.apply(model.params, model.extra, x, key=key, train=train)
    other, _ = model.apply(model.params, model.extra, x, key=jax.random.key(77), train=train)
    assert np.array_equal(one, same_key)
    assert np.array_equal(one, other) is not random


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        (("head/kernel", "head/bias"), set()),
        (("bn/bias",), STATISTICS),
        (("conv/kernel",), set()),
    ],
)
def test_a_frozen_batch_norm_keeps_its_statistics_bit_by_bit(model, x, key, trained, expected):
    train = training_selector(paths(model.params), trained)
    _, extra = model.apply(model.params, model.extra, x, key=key, train=train)
    assert moved(extra, model) == expected


def test_batch_norm_in_inference_mode_normalises_by_the_running_statistics(model, x, key):
    frozen = model.capture(model.params, model.extra, x, "bn", key=key, train="dropout")[2]["bn"]
    running = model.capture(model.params, model.extra, x, "bn")[2]["bn"]
    batch = model.capture(model.params, model.extra, x, "bn", key=key, train="bn")[2]["bn"]
    assert np.array_equal(frozen, running)
    np.testing.assert_allclose(batch.mean((0, 1, 2)), 0, atol=1e-5)
    assert abs(running.mean()) > 1e-3


def test_a_train_selector_that_matches_nothing_raises(model, x, key):
    with pytest.raises(SelectionError, match=r"train=: selector 'bnn' matched none of \d modules. Nearest: bn"):
        model.apply(model.params, model.extra, x, key=key, train="bnn")


def test_train_of_another_type_raises(model, x):
    with pytest.raises(SelectionError, match=r"train= expects False, True, or a selector.*got int.*static"):
        model.apply(model.params, model.extra, x, train=1)


def test_missing_and_surplus_leaves_are_named(model, x):
    params = {**model.params, "haed": model.params["head"]}
    del params["head"]
    with pytest.raises(SelectionError, match="params lacks head/bias, head/kernel and has the unknown haed/bias"):
        model.apply(params, model.extra, x)


def test_a_hole_is_named(model, x):
    with pytest.raises(
        SelectionError, match=r"params have a Hole at 'head/.*put the other half back with tuning.merge"
    ):
        model.apply(split(model.params, "head/**")[1], model.extra, x)


def test_jit_agrees_and_is_traced_once(model, x, key):
    traces = []

    def forward(params, extra, inputs, key, train):
        traces.append(train)
        return model.apply(params, extra, inputs, key=key, train=train)

    compiled = jax.jit(forward, static_argnames="train")
    first = compiled(model.params, model.extra, x, key, train="bn")
    compiled(model.params, model.extra, x, key, train="bn")
    assert traces == ["bn"]
    eager = model.apply(model.params, model.extra, x, key=key, train="bn")
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(eager), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_apply_itself_can_be_jitted_and_compares_equal_to_itself(model, x):
    compiled = jax.jit(model.apply, static_argnames="train")
    np.testing.assert_allclose(
        compiled(model.params, model.extra, x)[0], model.apply(model.params, model.extra, x)[0], rtol=2e-5, atol=2e-6
    )
    assert model.apply == model._replace(preprocess=None).apply
    assert hash(model.apply) == hash(model.apply)


def test_traces_under_eval_shape(model, x):
    shapes = jax.eval_shape(lambda p, e, i: model.apply(p, e, i), model.params, model.extra, x)
    assert shapes[0].shape == (4, 5)
    assert jax.tree.structure(shapes[1]) == jax.tree.structure(model.extra)


def test_vmap_over_params_is_a_loop_over_params(model, x, key):
    other = jax.tree.map(lambda leaf: leaf * 1.5, model.params)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), model.params, other)
    outputs, extra = jax.vmap(lambda p: model.apply(p, model.extra, x, key=key, train="bn"))(both)
    for number, params in enumerate((model.params, other)):
        expected, statistics = model.apply(params, model.extra, x, key=key, train="bn")
        np.testing.assert_allclose(outputs[number], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(extra["bn"]["var"][number], statistics["bn"]["var"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train", [False, True])
def test_gradients_reach_every_parameter(model, x, key, train):
    def loss(params):
        return (model.apply(params, model.extra, x, key=key, train=train)[0] ** 2).sum()

    gradients = paths(jax.grad(loss)(model.params))
    assert all(np.isfinite(g).all() for g in gradients.values())
    zero = {path for path, g in gradients.items() if not np.abs(g).max() > 1e-6}
    assert zero <= ({"conv/bias"} if train else set())  # batch statistics take the bias before them away


def test_capture_gives_outputs_and_features_of_one_pass(model, x, key):
    outputs, extra, found = model.capture(model.params, model.extra, x, ["conv", "head"], key=key, train=True)
    expected, after = model.apply(model.params, model.extra, x, key=key, train=True)
    assert set(found) == {"conv", "head"}
    assert np.array_equal(outputs, expected)
    assert np.array_equal(found["head"], outputs)
    assert found["conv"].shape == (4, 6, 6, 3)
    assert all(same(extra, after).values())


def test_capture_under_jit_and_grad(model, x):
    @jax.jit
    def loss(params):
        return (model.capture(params, model.extra, x, "bn")[2]["bn"] ** 2).sum()

    gradients = paths(jax.grad(loss)(model.params))
    assert np.abs(gradients["bn/scale"]).max() > 0
    assert np.abs(gradients["conv/kernel"]).max() > 0
    assert not np.abs(gradients["head/kernel"]).max() > 0


def test_what_is_not_used_is_not_computed(model, x):
    def text(function):
        return jax.jit(function).lower(model.params).compile().as_text()

    assert "dot(" in text(lambda p: model.capture(p, model.extra, x, "conv")[0])
    assert "dot(" not in text(lambda p: model.capture(p, model.extra, x, "conv")[2])


@pytest.mark.parametrize("at", ["heda", ["conv", "heda"]])
def test_capturing_nothing_names_the_nearest_modules(model, x, at):
    with pytest.raises(SelectionError, match=r"capture\(\): selector 'heda' matched none of 4 modules. Nearest: head"):
        model.capture(model.params, model.extra, x, at)


def test_capture_of_no_selector_raises(model, x):
    with pytest.raises(SelectionError, match=r"capture\(\) expects at least one module"):
        model.capture(model.params, model.extra, x, [])


def test_capture_of_another_type_raises(model, x):
    with pytest.raises(SelectionError, match="expected a selector or a glob such as 'head/\\*\\*', got int"):
        model.capture(model.params, model.extra, x, 3)


def test_module_paths(model, x):
    found = interop.module_paths(model, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert tuple(found) == ("", *MODULES)
    assert set(found["bn"]) == {"bn/scale", "bn/bias", "bn/mean", "bn/var"}
    assert found["dropout"] == ()


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_inputs_that_are_a_dict_become_keywords(models, kind, x):
    model = models[kind]
    outputs, _ = model.apply(model.params, model.extra, {"x": x})
    assert np.array_equal(outputs, model.apply(model.params, model.extra, x)[0])
