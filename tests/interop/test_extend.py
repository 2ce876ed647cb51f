import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transferjax import interop
from transferjax._errors import SelectionError, TransferError
from transferjax.tree import auxiliary, paths, training_selector

INIT = {"scale": jnp.full(5, 2.0)}


def scaled(aux, output):
    return output * aux["gain"]["scale"]


def test_extend_leaves_outputs_and_extra_alone(model, x, key):
    wide = interop.extend(model, "gain", INIT)
    assert set(wide.params) == {"model", "aux"}
    for ours, theirs in zip(
        jax.tree.leaves(wide.apply(wide.params, wide.extra, x, key=key, train="bn")),
        jax.tree.leaves(model.apply(model.params, model.extra, x, key=key, train="bn")),
        strict=True,
    ):
        assert np.array_equal(ours, theirs)
    found = wide.capture(wide.params, wide.extra, x, "conv")[2]
    assert np.array_equal(found["conv"], model.capture(model.params, model.extra, x, "conv")[2]["conv"])
    assert interop.strip(wide.params) is model.params
    assert interop.strip(model.params) is model.params


def test_extending_twice_nests_the_model_once(model, x):
    twice = interop.extend(interop.extend(model, "gain", INIT), "bias", jnp.zeros(5))
    assert twice.params == {"model": model.params, "aux": {"gain": INIT, "bias": twice.params["aux"]["bias"]}}
    assert np.array_equal(twice.apply(twice.params, twice.extra, x)[0], model.apply(model.params, model.extra, x)[0])


@pytest.mark.parametrize("first", ["extend", "insert"])
def test_an_inserted_function_uses_the_new_weights(model, x, first):
    steps = [lambda m: interop.extend(m, "gain", INIT), lambda m: interop.insert(m, "head", scaled)]
    wide = functools.reduce(lambda m, step: step(m), steps if first == "extend" else steps[::-1], model)
    plain, _ = model.apply(model.params, model.extra, x)
    outputs, _, found = wide.capture(wide.params, wide.extra, x, "head")
    np.testing.assert_allclose(outputs, 2 * plain, rtol=1e-6)
    assert np.array_equal(found["head"], outputs)

    def loss(params):
        return wide.apply(params, wide.extra, x)[0].sum()

    gradients = jax.jit(jax.grad(loss))(wide.params)
    np.testing.assert_allclose(gradients["aux"]["gain"]["scale"], plain.sum(0), rtol=1e-4, atol=1e-5)
    assert np.abs(gradients["model"]["conv"]["kernel"]).max() > 0


def test_functions_act_in_the_order_of_their_insertion(model, x):
    changed = interop.insert(interop.insert(model, "head", lambda _, y: y + 1), "{head,conv}", lambda _, y: y * 10)
    inner = interop.insert(model, "conv", lambda _, y: y * 10)
    np.testing.assert_allclose(
        changed.apply(changed.params, changed.extra, x)[0],
        10 * (inner.apply(inner.params, inner.extra, x)[0] + 1),
        rtol=1e-5,
    )


def test_missing_weights_name_the_line_to_write(model, x):
    changed = interop.insert(model, "head", scaled)
    line = r"no auxiliary weights 'gain'. {}Add them first: model = tj.extend\(model, 'gain', init\)"
    with pytest.raises(SelectionError, match=line.format("It has none. ")):
        changed.apply(changed.params, changed.extra, x)
    other = interop.extend(changed, "bias", jnp.zeros(5))
    with pytest.raises(SelectionError, match=line.format("It has bias. ")):
        other.apply(other.params, other.extra, x)
    with pytest.raises(SelectionError, match=line.format("It has none. ")):
        auxiliary(model.params, "gain")


def test_aux_is_a_pytree(model, x):
    def function(aux, output):
        return output * sum(jax.tree.leaves(jax.tree.map(jnp.sum, aux)))

    wide = interop.insert(interop.extend(model, "gain", INIT), "head", function)
    plain, _ = model.apply(model.params, model.extra, x)
    np.testing.assert_allclose(wide.apply(wide.params, wide.extra, x)[0], 10 * plain, rtol=1e-5)


def test_module_paths_stay_as_they_are(model, x, key):
    wide = interop.extend(model, "gain", INIT)
    everything = list(paths(wide.params))
    on = training_selector(everything, ["model/head/kernel", "aux/gain/scale"])
    assert [m for m in ("", "conv", "bn", "head", "gain") if on(m)] == ["", "head", "gain"]
    assert not training_selector(everything, ["aux/gain/scale"])("")
    shown = interop.module_paths(wide, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert set(shown["bn"]) == {"bn/scale", "bn/bias", "bn/mean", "bn/var"}
    _, extra = wide.apply(wide.params, wide.extra, x, key=key, train=on)
    assert np.array_equal(extra["bn"]["mean"], wide.extra["bn"]["mean"])


def test_init_as_a_function_of_a_key(model):
    def init(key):
        return {"kernel": jax.random.normal(key, (3,))}

    one, two = (interop.extend(model, "map", init, key=jax.random.key(k)) for k in (0, 1))
    assert not np.array_equal(one.params["aux"]["map"]["kernel"], two.params["aux"]["map"]["kernel"])
    with pytest.raises(TransferError, match=r"init is a function of a key. Pass one: extend\(model, 'map', init, key="):
        interop.extend(model, "map", init)


@pytest.mark.parametrize(
    ("name", "init", "message"),
    [
        ("a/b", INIT, "expects a name without '/', got 'a/b'"),
        ("", INIT, "expects a name without '/', got ''"),
        ("list", [jnp.ones(2)], "got list at 'list'. Write a list as {'0'"),
        ("number", {"a": 3.0}, "got float at 'number/a'"),
        ("key", {"a": {0: jnp.ones(2)}}, r"expects string keys, got 0 below 'key/a'. Write str\(key\)"),
    ],
)
def test_what_cannot_be_added(models, name, init, message):
    with pytest.raises(SelectionError, match=message):
        interop.extend(models["nnx"], name, init)


def test_a_name_that_is_taken(models):
    wide = interop.extend(models["nnx"], "gain", INIT)
    with pytest.raises(SelectionError, match=r"has auxiliary weights 'gain' already. Choose another name than gain"):
        interop.extend(wide, "gain", INIT)


def test_an_extended_model_needs_both_parts(models, x):
    wide = interop.extend(models["nnx"], "gain", INIT)
    with pytest.raises(SelectionError, match=r"expects params \{'model': ..., 'aux': ...\}, got bn, conv, head"):
        wide.apply(models["nnx"].params, wide.extra, x)
    with pytest.raises(SelectionError, match=r"'aux': ...\}, got ArrayImpl"):
        wide.apply(jnp.ones(2), wide.extra, x)


def test_inserting_nowhere(models, x):
    message = r"insert\(\): selector 'heda' matched none of 4 modules. Nearest: head"
    with pytest.raises(SelectionError, match=message):
        interop.insert(models["nnx"], "heda", scaled)
    for kind in ("linen", "dict"):
        changed = interop.insert(models[kind], "heda", scaled)
        with pytest.raises(SelectionError, match=message):
            changed.apply(changed.params, changed.extra, x)


def test_inserting_what_is_no_function(models):
    with pytest.raises(TransferError, match=r"insert\(\) expects a function \(aux, output\) -> output, got int"):
        interop.insert(models["nnx"], "head", 3)


@pytest.mark.parametrize("verb", ["extend", "insert", "tie", "batch_norm_momentum", "module_paths"])
def test_a_foreign_model_is_told_to_be_wrapped(models, verb):
    arguments = {
        "extend": ("gain", INIT), "insert": ("head", scaled), "tie": ({},), "batch_norm_momentum": (0.5,),
        "module_paths": (),
    }[verb]  # fmt: skip
    foreign = models["nnx"]._replace(apply=lambda *args, **kwargs: None)
    message = rf"{verb}\(\) expects a Model made by transferjax.interop.nnx, linen or pure, got {{}}.*interop.pure\("
    with pytest.raises(TransferError, match=message.format("function")):
        getattr(interop, verb)(foreign, *arguments)
    with pytest.raises(TransferError, match=message.format("int")):
        getattr(interop, verb)(3, *arguments)


def autoencoder():
    def apply(params, x):
        return x @ params["encoder"]["kernel"] @ params["decoder"]["kernel"].T

    shared = jax.random.normal(jax.random.key(0), (3, 2))
    return interop.pure(apply, {"encoder": {"kernel": shared}, "decoder": {"kernel": shared}})


def test_tied_leaves_learn_as_one():
    model = autoencoder()
    tied = interop.tie(model, {"decoder/kernel": "encoder/kernel"})
    x = jnp.ones((1, 3))
    assert list(paths(tied.params)) == ["encoder/kernel"]
    assert np.array_equal(tied.apply(tied.params, {}, x)[0], model.apply(model.params, {}, x)[0])
    both = jax.grad(lambda p: model.apply(p, {}, x)[0].sum())(model.params)
    one = jax.grad(lambda p: tied.apply(p, {}, x)[0].sum())(tied.params)
    np.testing.assert_allclose(
        one["encoder"]["kernel"], both["encoder"]["kernel"] + both["decoder"]["kernel"], rtol=1e-6
    )
    with pytest.raises(SelectionError, match="params lack 'encoder/kernel', to which another leaf is tied"):
        tied.apply({"encoder": {}}, {}, x)


def test_tie_composes_with_extend():
    tied = interop.tie(autoencoder(), {"decoder/kernel": "encoder/kernel"})
    wide = interop.extend(tied, "gain", INIT)
    x = jnp.ones((1, 3))
    assert np.array_equal(wide.apply(wide.params, {}, x)[0], tied.apply(tied.params, {}, x)[0])


@pytest.mark.parametrize(
    ("ties", "message"),
    [
        ({"decoder/kernle": "encoder/kernel"}, "there is no parameter 'decoder/kernle'. Nearest: decoder/kernel"),
        ({"decoder/kernel": "encoder"}, "there is no parameter 'encoder'"),
        ({"decoder/kernel": "encoder/kernel", "encoder/kernel": "decoder/kernel"}, "is kept and a duplicate"),
        ({"c": "decoder/kernel"}, r"'c' \(3, 2\) float32 and 'decoder/kernel' \(3, 2\) float32 differ"),
        ({"d": "decoder/kernel"}, r"'d' \(2,\) float32 and 'decoder/kernel' \(3, 2\) float32 differ"),
    ],
)
def test_what_cannot_be_tied(ties, message):
    model = autoencoder()
    params = {**model.params, "c": jnp.zeros((3, 2)), "d": jnp.zeros(2)}
    with pytest.raises(SelectionError, match=message):
        interop.tie(interop.pure(lambda p, x: x, params), ties)


def test_abstract_leaves_are_tied_by_shape():
    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    tied = interop.tie(
        interop.pure(lambda p, x: x, {"a": shape, "b": jax.ShapeDtypeStruct((2,), jnp.float32)}), {"b": "a"}
    )
    assert tied.params == {"a": shape}


def test_equal_layers_compare_equal(models):
    one, two = (interop.batch_norm_momentum(interop.extend(models["nnx"], "g", INIT), 0.9) for _ in range(2))
    assert one.apply == two.apply
    assert hash(one.apply) == hash(two.apply)
    assert one.apply != interop.batch_norm_momentum(interop.extend(models["nnx"], "g", INIT), 0.8).apply


def test_map_inputs_puts_a_function_in_front_of_apply_and_capture():
    model = interop.pure(lambda params, x: interop.mark("body", x * params["scale"]), {"scale": jnp.float32(2)})
    mapped = interop.map_inputs(model, jnp.negative)
    assert float(mapped.apply(model.params, {}, jnp.float32(3))[0]) == -6
    assert float(mapped.capture(model.params, {}, jnp.float32(3), "body")[2]["body"]) == -6


def test_map_inputs_expects_a_function():
    model = interop.pure(lambda params, x: x, {"scale": jnp.float32(2)})
    with pytest.raises(TransferError, match="map_inputs\\(\\) expects a function inputs -> inputs, got int"):
        interop.map_inputs(model, 3)
