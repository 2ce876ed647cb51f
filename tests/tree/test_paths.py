"""Paths are one name per leaf, the same for every kind of tree."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import transferjax as tj
from transferjax.tree import flatten, natural, nest


class Attention(eqx.Module):
    query: jax.Array
    key: jax.Array
    value: jax.Array
    heads: int = eqx.field(static=True, default=2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    value: object
    rest: object


class Network(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(11)])
        self.norm = nnx.BatchNorm(2, rngs=rngs)


def test_fields_called_value_keep_their_name():
    module = Attention(jnp.zeros(1), jnp.ones(2), jnp.zeros(3))
    assert list(tj.paths(module)) == ["key", "query", "value"]
    assert list(tj.paths({"attention": module})) == ["attention/key", "attention/query", "attention/value"]
    assert list(tj.paths(Pair(1.0, [2.0, {"value": 3.0}]))) == ["rest/0", "rest/1/value", "value"]


def test_nnx_module_state_and_pure_dict_have_the_same_paths():
    module = Network(nnx.Rngs(0))
    state = nnx.state(module)
    expected = [f"blocks/{i}/{name}" for i in range(11) for name in ("bias", "kernel")]
    expected += ["norm/bias", "norm/mean", "norm/scale", "norm/var"]
    assert list(tj.paths(module)) == list(tj.paths(state)) == expected
    assert list(tj.paths(nnx.to_pure_dict(state))) == expected
    assert all(not isinstance(leaf, nnx.Variable) for leaf in tj.paths(state).values())


def test_an_nnx_field_called_value_keeps_its_name():
    class Keyed(nnx.Module):
        def __init__(self):
            self.value = nnx.Param(jnp.zeros(1))
            self.table = nnx.Param({"value": jnp.zeros(2), "key": jnp.zeros(3)})

    assert list(tj.paths(nnx.state(Keyed()))) == ["table/key", "table/value", "value"]
    assert list(tj.paths(Keyed())) == ["table/key", "table/value", "value"]


def test_linen_variables_have_their_collection_in_front():
    variables = nn.BatchNorm(use_running_average=False).init(jax.random.key(0), jnp.ones((2, 3)))
    assert list(tj.paths(variables)) == ["batch_stats/mean", "batch_stats/var", "params/bias", "params/scale"]


def test_numbers_sort_as_numbers():
    names = ["b/10/w", "b/2/w", "b10", "b2", "b", "b/x", "10", "9", "a²", "²", "b/2"]
    assert sorted(names, key=natural) == ["9", "10", "a²", "b", "b/2", "b/2/w", "b/10/w", "b/x", "b2", "b10", "²"]
    assert list(tj.paths({"layers": [0.0] * 12}))[-2:] == ["layers/10", "layers/11"]


def test_two_leaves_of_one_path_raise():
    message = "two leaves have the path 'a/b'. Expected one leaf per path; a dict key that contains '/' collides"
    for function in (tj.paths, tj.summary, lambda tree: tj.split(tree, "**"), lambda tree: tj.mask(tree, "**")):
        with pytest.raises(tj.SelectionError, match=message):
            function({"a/b": 1.0, "a": {"b": 2.0}})


def test_flatten_counts_holes_when_asked():
    tree = {"a": tj.Hole(), "b": 1.0}
    assert [path for path, _ in flatten(tree)[0]] == ["b"]
    assert [path for path, _ in flatten(tree, holes=True)[0]] == ["a", "b"]
    state = nnx.State({"a": nnx.Param(tj.Hole()), "b": nnx.Param(jnp.zeros(1))})
    assert [path for path, _ in flatten(state, holes=True)[0]] == ["a", "b"]


def test_nest_is_the_inverse_of_paths():
    tree = {"a": {"b": 1.0, "c": {"0": 2.0}}, "d": np.zeros(1)}
    assert nest(tj.paths(tree)) == tree
    with pytest.raises(tj.SelectionError, match=r"'a/b' lies below another leaf\. Expected leaves only at the ends"):
        nest({"a": 1.0, "a/b": 2.0})
    with pytest.raises(tj.SelectionError, match="'a/b' lies below another leaf"):
        nest({"a": {"x": 1.0}, "a/b": 2.0})
    with pytest.raises(tj.SelectionError, match="'a' is a leaf and a prefix of another path, or comes twice"):
        nest({"a/b": 1.0, "a": 2.0})
