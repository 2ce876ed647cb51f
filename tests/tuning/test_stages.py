"""Stages: modules in the order in which the forward pass uses them."""

import jax
import jax.numpy as jnp
import pytest

import transferjax as tj
from transferjax.tuning._stages import stages

X = jax.ShapeDtypeStruct((2, 4), jnp.float32)


def kernel(size=4):
    return {"kernel": jnp.ones((size, size)), "bias": jnp.ones(size)}


def model(forward, params, extra=None):
    return tj.Model(
        lambda p, e, x, *, key=None, train=False: (forward(p, e, x), e), None, params, {} if extra is None else extra
    )


def dense(p, x):
    return jnp.tanh(x @ p["kernel"] + p["bias"])


def names(found):
    return [s.name.strip("'") for s in found]


def test_order_is_that_of_use_not_of_names():
    net = model(lambda p, e, x: dense(p["a"], dense(p["m"], dense(p["z"], x))), {k: kernel() for k in "amz"})
    assert names(stages(net, X)) == ["z/*", "m/*", "a/*"]


def test_casting_everything_first_does_not_count_as_use():
    def forward(p, e, x):
        half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), p)  # in the order of the keys: a, z
        return dense(half["a"], dense(half["z"], x.astype(jnp.bfloat16)))

    assert names(stages(model(forward, {k: kernel() for k in "az"}), X)) == ["z/*", "a/*"]


def test_a_weight_that_is_normalised_before_all_layers_is_used_where_it_meets_the_data():
    def forward(p, e, x):
        ready = {k: w["kernel"].T / jnp.sum(w["kernel"] ** 2) + 1.0 for k, w in p.items()}
        return x @ ready["b"] @ ready["a"]

    net = model(forward, {k: {"kernel": jnp.ones((4, 4))} for k in "ab"})
    assert names(stages(net, X)) == ["b/*", "a/*"]


@pytest.mark.parametrize(
    "wrap", [jax.jit, jax.checkpoint, jax.vmap, lambda f: lambda x: jax.lax.cond(x.sum() > 0, f, f, x)]
)
def test_order_is_found_inside_calls(wrap):
    net = model(
        lambda p, e, x: wrap(lambda y: dense(p["a"], y))(wrap(lambda y: dense(p["b"], y))(x)),
        {k: kernel() for k in "ab"},
    )
    assert names(stages(net, X)) == ["b/*", "a/*"]


def test_a_scanned_stack_is_one_stage_between_its_neighbours():
    def forward(p, e, x):
        x = dense(p["stem"], x)
        x, _ = jax.lax.scan(lambda h, w: (dense(w, h), None), x, p["layers"])
        return dense(p["head"], x)

    params = {"head": kernel(), "layers": jax.tree.map(lambda w: jnp.stack([w] * 3), kernel()), "stem": kernel()}
    assert names(stages(model(forward, params), X)) == ["stem/*", "layers/*", "head/*"]


def test_unused_modules_come_first_and_nothing_is_missed_or_matched_twice():
    params = {
        "blocks": {"0": {"conv": kernel(), "gain": jnp.ones(4)}, "10": {"conv": kernel()}, "2": {"conv": kernel()}},
        "scale": jnp.ones(()),
        "spare": {"x10": kernel(), "x2": kernel()},
    }

    def forward(p, e, x):
        for name in ("0", "2", "10"):
            x = dense(p["blocks"][name]["conv"], x) + e["mean"]
            x = x * p["blocks"][name].get("gain", 1.0)
        _ = dense(p["spare"]["x2"], x)  # computed, but it reaches no output
        return x * p["scale"]

    found = stages(model(forward, params, {"mean": jnp.ones(4)}), X)
    assert names(found) == [
        *("spare/x2/*", "spare/x10/*"),
        *("blocks/0/conv/*", "blocks/0/*", "blocks/2/conv/*", "blocks/10/conv/*", "*"),
    ]
    for path, leaf in tj.paths(params).items():
        assert sum(selector(path, leaf) for selector in found) == 1, path


def test_a_parameter_that_reaches_the_output_without_data_comes_last():
    net = model(lambda p, e, x: (p["a"]["kernel"] * 2, dense(p["b"], x)), {k: kernel() for k in "ab"})
    assert names(stages(net, X)) == ["b/*", "a/*"]


def test_inputs_may_be_a_dict_and_integers():
    def forward(p, e, x):
        return dense(p["body"], p["embed"]["table"][x["tokens"]] + p["place"]["table"])

    params = {"body": kernel(), "embed": {"table": jnp.ones((9, 4))}, "place": {"table": jnp.ones((3, 4))}}
    assert names(stages(model(forward, params), {"tokens": jnp.zeros((2, 3), jnp.int32)})) == [
        *("embed/*", "place/*", "body/*")
    ]


def test_module_names_with_glob_characters_are_taken_literally():
    net = model(lambda p, e, x: dense(p["a*"], dense(p["ab"], x)), {"a*": kernel(), "ab": kernel()})
    first, second = stages(net, X)
    assert first("ab/bias") and not first("a*/bias") and second("a*/bias") and not second("ab/bias")


def test_stages_feed_last():
    net = model(lambda p, e, x: dense(p["a"], dense(p["z"], x)), {k: kernel() for k in "az"})
    trainable, _ = tj.last(1, stages(net, X)).init(jax.random.key(0), net.params)
    assert list(tj.paths(trainable)) == ["a/bias", "a/kernel"]


def test_no_inputs():
    with pytest.raises(tj.SelectionError, match=r"expects inputs with at least one array, as model\.apply takes them"):
        stages(model(lambda p, e, x: p["a"]["bias"], {"a": kernel()}), {})


@pytest.mark.parametrize("model, name", [("efficientnet_lite0", r"'efficientnet_lite0'"), (3, "name")])
def test_what_is_no_model_raises(model, name):
    message = rf"stages\(\) expects a Model, got {type(model).__name__}\. For .* use tj\.models\.stages\({name}\)\."
    with pytest.raises(tj.SelectionError, match=message):
        tj.stages(model, jnp.ones(2))
