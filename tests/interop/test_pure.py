import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transferjax import interop
from transferjax._errors import SelectionError, TransferError
from transferjax.tree import paths


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Weights:
    layers: list
    scale: jax.Array


def test_any_pytree_becomes_nested_dicts_and_comes_back():
    def apply(params, x):
        assert isinstance(params, Weights)
        return x * params.layers[1]["w"] * params.scale

    model = interop.pure(apply, Weights([{"w": 2.0}, {"w": 3.0}], 5.0))
    assert model.params == {"layers": {"0": {"w": 2.0}, "1": {"w": 3.0}}, "scale": 5.0}
    assert model.extra == {}
    assert model.apply(model.params, {}, 1.0) == (15.0, {})


def test_key_and_train_are_passed_where_they_are_accepted():
    model = interop.pure(lambda params, x, *, key, train: (x, key, train), {})
    assert model.apply({}, {}, 1.0, key=2, train=True)[0] == (1.0, 2, True)
    assert model.apply({}, {}, 1.0)[0] == (1.0, None, False)


def test_extra_moves_with_the_root_when_no_part_is_named():
    model = interop.pure(lambda params, extra, x: (x, {"count": extra["count"] + 1}), {}, {"count": 0})
    assert model.apply({}, model.extra, 1.0)[1] == {"count": 0}
    assert model.apply({}, model.extra, 1.0, train=True)[1] == {"count": 1}


def test_an_extra_of_another_structure_raises():
    model = interop.pure(lambda params, extra, x: (x, {}), {}, {"count": 0})
    with pytest.raises(TransferError, match="returned an `extra` of another structure"):
        model.apply({}, model.extra, 1.0)


def test_a_value_marked_twice_and_one_in_parts():
    model = interop.pure(
        lambda params, x: interop.mark("a", interop.mark("a", x) + 1) + interop.mark("b", (x, x))[0], {}
    )
    found = model.capture({}, {}, 1.0, "*")[2]
    assert found == {"a": 1.0, "a#2": 2.0, "b/0": 1.0, "b/1": 1.0}


def test_two_captures_of_one_name_raise():
    model = interop.pure(lambda params, x: interop.mark("a", (interop.mark("a/0", x),)), {})
    with pytest.raises(SelectionError, match=r"'a/0' names a part of the outputs of '.*' and those of another module"):
        model.capture({}, {}, 1.0, "**")


def test_without_marks_capture_names_the_way_out():
    model = interop.pure(lambda params, x: x, {})
    with pytest.raises(SelectionError, match=r"the model names no modules.*transferjax.interop.mark\(path, value\)"):
        model.capture({}, {}, 1.0, "body")


def test_outside_of_a_pass_marks_do_nothing():
    assert interop.mark("a", 3) == 3
    assert interop.training("a") is False
    assert interop.momentum_in_use() == 0.99


def test_a_pass_inside_a_pass_has_its_own_marks():
    inner = interop.pure(lambda params, x: interop.mark("a", x), {})
    outer = interop.pure(lambda params, x: interop.mark("b", inner.apply({}, {}, x, train=True)[0]), {})
    assert set(outer.capture({}, {}, 1.0, "*")[2]) == {"b"}


def test_pure_of_no_function():
    with pytest.raises(TransferError, match=r"pure\(\) expects a function apply\(params, inputs\), got int"):
        interop.pure(3, {})


class Net(eqx.Module):
    linear: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    value: jax.Array
    table: jax.Array

    def __init__(self, key):
        self.linear = eqx.nn.Linear(2, 3, key=key)
        self.dropout = eqx.nn.Dropout(0.5)
        self.value = jnp.ones(3)
        self.table = jnp.arange(3)

    def __call__(self, x, key=None):
        return self.dropout(interop.mark("linear", self.linear(x)) * self.value + self.table, key=key)


def test_an_equinox_module():
    module = Net(jax.random.key(0))
    model = interop.equinox(module)
    x = jax.random.normal(jax.random.key(1), (4, 2))
    assert set(paths(model.params)) == {"linear/weight", "linear/bias", "value"}
    assert set(paths(model.extra)) == {"table"}
    expected = jax.vmap(eqx.nn.inference_mode(module))(x)
    outputs, extra = model.apply(model.params, model.extra, x)
    np.testing.assert_allclose(outputs, expected, rtol=1e-6)
    assert extra == model.extra
    one, two = (model.apply(model.params, model.extra, x, key=jax.random.key(k), train="dropout")[0] for k in (0, 1))
    assert not np.array_equal(one, two)
    assert np.array_equal(model.apply(model.params, model.extra, x, key=jax.random.key(0), train="linear")[0], outputs)
    gradients = jax.grad(lambda p: model.apply(p, model.extra, x)[0].sum())(model.params)
    assert gradients["value"].shape == (3,)
    assert set(interop.module_paths(model, x)) == {"", "linear", "dropout"}
    with pytest.raises(
        SelectionError, match=r"capture\(\): selector 'dropout' matched dropout, which .* does not call"
    ):
        model.capture(model.params, model.extra, x, "dropout")


def test_an_equinox_module_called_ones_own_way():
    model = interop.equinox(Net(jax.random.key(0)), call=lambda module, x, key: jax.vmap(module.linear)(x))
    assert model.apply(model.params, model.extra, jnp.ones((4, 2)))[0].shape == (4, 3)


def test_equinox_of_what_cannot_be_called():
    with pytest.raises(TransferError, match=r"equinox\(\) expects a callable pytree, got dict"):
        interop.equinox({})
