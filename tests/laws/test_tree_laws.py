"""split, fill, mask and label on random trees and on the trees of every framework, and in optax."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import transferjax as tj
from transferjax.testing import check_selector, check_split
from transferjax.tree import nest

NAMES = st.sampled_from(["head", "heads", "kernel", "bias", "0", "1", "10", "value", "lora_a", "a.b", "x[", "(y)"])
LEAVES = st.integers(0, 3).map(lambda n: np.full((n,), n, np.float32))
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.dictionaries(NAMES, inner, min_size=1, max_size=4),
        st.lists(inner, min_size=1, max_size=3),
        st.tuples(inner, inner),
    ),
    max_leaves=12,
).filter(lambda tree: isinstance(tree, dict))


def selectors(path):
    """Selectors that match a given path, and perhaps others."""
    segments = path.split("/")
    literal = tj.regex(path.replace("\\", "\\\\").translate({ord(c): "\\" + c for c in ".[]()*+?"}))
    return st.sampled_from(
        [
            literal,
            literal | tj.glob("**/kernel"),
            tj.glob("/".join("*" for _ in segments)),
            tj.glob("**/" + "?" * len(segments[-1])),
            tj.where(lambda p, leaf: p >= path, "after"),
            tj.where(lambda p, leaf: leaf.ndim == 1),
            ~tj.glob("none/such"),
            tj.everything,
        ]
    )


@given(st.data())
def test_fill_undoes_split_on_random_trees(data):
    tree = data.draw(TREES)
    selector = data.draw(selectors(data.draw(st.sampled_from(list(tj.paths(tree))))))
    check_split(tree, selector)
    check_selector(tree, selector)
    assert (
        tj.paths(tree).keys()
        == {**tj.paths(tj.split(tree, selector)[0]), **tj.paths(tj.split(tree, selector)[1])}.keys()
    )


@given(st.data())
def test_labels_are_a_partition_of_random_trees(data):
    tree = data.draw(TREES)
    first = data.draw(st.sampled_from(list(tj.paths(tree))))
    chosen = tj.where(lambda path, leaf: path == first, "first")
    labels = tj.label(tree, {"a": chosen}, default="b")
    assert jax.tree.structure(labels) == jax.tree.structure(tree)
    assert [path for path, name in tj.paths(labels).items() if name == "a"] == [first]
    assert tj.mask(tree, chosen) == jax.tree.map(lambda name: name == "a", labels)


@given(st.dictionaries(st.sampled_from(["a/b", "a/c/0", "d", "e/f", "a/c/10"]), LEAVES, min_size=1))
def test_nest_undoes_paths(flat):
    assert set(tj.paths(nest(flat))) == set(flat)


class Equinox(eqx.Module):
    query: jax.Array
    key: jax.Array
    value: jax.Array
    head: eqx.nn.Linear


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    head: object
    rest: object


class Module(nnx.Module):
    def __init__(self):
        self.head = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        self.blocks = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(i)) for i in range(2)])


def _linen():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(nn.Dense(2, name="stem")(x))

    return Network().init(jax.random.key(0), jnp.ones((1, 2)))


FRAMEWORKS = {
    "dict": lambda: {"head": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}, "stem": jnp.ones(2)},
    "nnx State": lambda: nnx.state(Module()),
    "nnx Module": Module,
    "linen": _linen,
    "equinox": lambda: Equinox(jnp.ones(1), jnp.ones(2), jnp.ones(3), eqx.nn.Linear(2, 3, key=jax.random.key(0))),
    "dataclass of lists": lambda: Pair([jnp.ones(2), (jnp.ones(3),)], {"head": jnp.ones(2), "stem": jnp.ones(4)}),
}


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_the_trees_of_every_framework_split_and_fill(name):
    tree = FRAMEWORKS[name]()
    for selector in ("**/head/**", tj.everything, tj.where(lambda path, leaf: leaf.ndim == 1), ~tj.glob("head/**")):
        check_split(tree, selector)
        check_selector(tree, selector)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_masks_and_labels_go_into_optax_as_they_are(name):
    tree = FRAMEWORKS[name]()
    mask = tj.mask(tree, "**/head/**")
    frozen = tj.mask(tree, ~tj.glob("**/head/**"))
    labels = tj.label(tree, {"new": "**/head/**"}, default="old")
    gradients = jax.tree.map(jnp.ones_like, tree)
    for tx in (
        optax.chain(optax.masked(optax.sgd(1.0), mask), optax.masked(optax.set_to_zero(), frozen)),
        optax.partition({"new": optax.sgd(1.0), "old": optax.set_to_zero()}, labels),
        optax.selective_transform(optax.sgd(1.0), freeze_mask=frozen),
    ):
        updates, _ = tx.update(gradients, tx.init(tree), tree)
        assert jax.tree.structure(updates) == jax.tree.structure(tree)
        chosen = tj.paths(mask)
        assert all((leaf == -1.0 * chosen[path]).all() for path, leaf in tj.paths(updates).items())
        optax.apply_updates(tree, updates)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_optimizers_and_gradients_see_no_hole(name):
    trainable, frozen = tj.split(FRAMEWORKS[name](), "**/head/**")
    tx = optax.adamw(0.1)
    loss = lambda part: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tj.fill(part, frozen)))
    updates, state = tx.update(jax.grad(loss)(trainable), tx.init(trainable), trainable)
    assert list(tj.paths(optax.apply_updates(trainable, updates))) == list(tj.paths(trainable))
    assert len(jax.tree.leaves(state)) == 1 + 2 * len(jax.tree.leaves(trainable))


def test_ties_are_kept_by_the_nnx_graph_and_named_elsewhere():
    class Tied(nnx.Module):
        def __init__(self):
            self.embedding = nnx.Param(jnp.ones((3, 2)))
            self.decoder = self.embedding

    graphdef, state = nnx.split(Tied())
    assert list(tj.paths(state)) == ["decoder"]
    check_split(state, "decoder")
    module = nnx.merge(graphdef, tj.fill(*tj.split(state, "decoder")))
    assert module.embedding is module.decoder
    model = tj.interop.nnx(Tied())
    assert len(tj.paths(model.params)) == 1
    table = jnp.ones((3, 2))
    check_split({"decoder": table, "embedding": table}, "decoder")
    with pytest.raises(tj.SelectionError, match="'decoder' and 'embedding' are one array"):
        tj.init(
            jax.random.key(0),
            tj.Model(None, None, {"decoder": table, "embedding": table}, {}),
            tj.full(),
            optax.sgd(1.0),
        )
