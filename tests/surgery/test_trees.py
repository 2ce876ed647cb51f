"""Leaves by path and back, for dicts, Models and NNX modules."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transferjax import Model
from transferjax._errors import PlanError
from transferjax.surgery import assemble, leaves


def model(params, extra):
    return Model(None, None, params, extra)


def test_leaves_of_a_model_share_one_namespace():
    found = leaves(model({"bn": {"scale": 1}, "fc": {"bias": 2}}, {"bn": {"mean": 3}}))
    assert found == {"bn/mean": 3, "bn/scale": 1, "fc/bias": 2}
    assert list(found) == ["bn/mean", "bn/scale", "fc/bias"]


def test_a_path_in_params_and_extra_raises():
    with pytest.raises(PlanError, match=r"params and extra of the Model both have 'bn/mean'. Expected one leaf"):
        leaves(model({"bn": {"mean": 1}}, {"bn": {"mean": 3}}))


def test_leaves_of_any_mapping_in_natural_order():
    mapping = types.MappingProxyType({"b.10": 1, "b.2": 2, "b.02": 3})
    assert list(leaves(mapping)) == ["b.02", "b.2", "b.10"]


def test_assemble_is_the_inverse_of_leaves():
    target = {"blocks": [{"w": 0.0}, {"w": 0.0}], "head": (0.0, None)}
    out = assemble(target, {"blocks/1/w": 2.0, "blocks/0/w": 1.0, "head/0": 3.0})
    assert out == {"blocks": [{"w": 1.0}, {"w": 2.0}], "head": (3.0, None)}


def test_assemble_gives_a_model_for_a_model():
    target = model({"bn": {"scale": 0}}, {"bn": {"mean": 0}})._replace(apply=print)
    out = assemble(target, {"bn/mean": 5, "bn/scale": 6})
    assert (out.params, out.extra, out.apply) == ({"bn": {"scale": 6}}, {"bn": {"mean": 5}}, print)


def test_assemble_gives_a_module_for_a_module():
    module = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    arrays = {"bias": jnp.ones(3), "kernel": jnp.full((2, 3), 2.0)}
    out = assemble(module, arrays)
    assert isinstance(out, nnx.Linear)
    assert np.array_equal(out(jnp.ones((1, 2))), [[5.0, 5.0, 5.0]])


def test_assemble_names_what_is_missing_and_what_is_over():
    with pytest.raises(PlanError, match=r"assemble\(\) has no array for b; expected one per leaf.*Nearest: bb"):
        assemble({"a": 0, "b": 0}, {"a": 1, "bb": 2})
    with pytest.raises(PlanError, match=r"assemble\(\) got arrays that the target has no leaf for: c. Nearest: a"):
        assemble({"a": 0}, {"a": 1, "c": 2})
