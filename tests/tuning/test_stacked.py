"""One adapter per example in one batch: the outputs of each are those of its adapter alone, at one base's cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax import interop, program
from transferjax._errors import DataError, SelectionError
from transferjax.models import _bert, _initialise
from transferjax.tuning import apply_stacked, stack_adapters

KEY = jax.random.key(0)
INDEX = np.array([2, 0, 1, 1, 2])


def normal(key, *shape):
    return jax.random.normal(jax.random.fold_in(KEY, key), shape)


def trained(tuning, params, count=3):
    """Adapters as they could be after training, and what is frozen."""
    fresh, frozen = tuning.init(KEY, params)
    leaves, treedef = jax.tree.flatten(fresh)
    moved = lambda n: [x + 0.3 * normal(100 * n + i, *x.shape) for i, x in enumerate(leaves)]
    return {f"task {n}": jax.tree.unflatten(treedef, moved(n)) for n in range(count)}, frozen


def plain():
    params = {"first": normal(0, 16, 24), "second": {"kernel": normal(1, 24, 8), "bias": normal(2, 8)}}
    apply = lambda params, x: jnp.tanh(x @ params["first"]) @ params["second"]["kernel"] + params["second"]["bias"]
    return interop.pure(apply, params), normal(3, 5, 7, 16)


def scanned():
    params = {"layers": normal(0, 3, 8, 8) / 3, "head": normal(1, 8, 2)}

    def apply(params, x):
        layer = lambda x, kernel: (jnp.tanh(x @ kernel), None)
        return {"out": jax.lax.scan(layer, x, params["layers"])[0] @ params["head"]}

    return interop.pure(apply, params), normal(3, 5, 8)


def convolutional():
    from flax import nnx

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.stem = nnx.Conv(2, 4, (3, 3), strides=(2, 2), rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.head = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.norm(self.stem(x))).mean((1, 2)))

    return interop.nnx(Network(nnx.Rngs(0))), normal(3, 5, 6, 6, 2)


def bert():
    variant = _bert.Variant(layers=2, width=8, heads=2, hidden=12, vocabulary=20, positions=16)
    model = interop.nnx(_initialise.materialise(lambda: _bert.build(variant, 3), KEY, _bert.std, "head/"))
    model = model._replace(params=jax.tree.map(lambda x: 10 * x if x.ndim > 1 else x, model.params))
    text = {"input_ids": np.arange(20).reshape(5, 4), "attention_mask": np.tril(np.ones((5, 4), int), 1)}
    return model, text


CASES = {
    "dense": (plain, lambda: tj.lora("{first,second/kernel}", 2, alpha=6.0)),
    "a chain with a head": (plain, lambda: tj.chain(lora=tj.lora("first", 2), head=tj.train("second/**"))),
    "dora": (plain, lambda: tj.dora("first", 2)),
    "ia3": (plain, lambda: tj.ia3("second/kernel")),
    "vera": (plain, lambda: tj.tuning.vera("first", 4)),
    "a residual as the base": (plain, lambda: tj.tuning.pissa("first", 2)),
    "a quantised base": (plain, lambda: tj.tuning.quantise("first", "int8", tj.lora("first", 2))),
    "scanned layers": (scanned, lambda: tj.lora("layers", 2, axes={"layers": "lio"})),
    "a convolution before BatchNorm": (convolutional, lambda: tj.lora("{stem,head}/kernel", 2)),
    "a text encoder": (bert, lambda: tj.lora("{**/query/kernel,embeddings/word/embedding}", 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_each_example_goes_through_its_own_adapter(name):
    build, make = CASES[name]
    (model, inputs), tuning = build(), make()
    adapters, frozen = trained(tuning, model.params)
    run = jax.jit(apply_stacked(model.apply, tuning))
    found = run(stack_adapters(adapters), frozen, model.extra, inputs, INDEX)
    alone = [model.apply(tuning.merge(one, frozen), model.extra, inputs)[0] for one in adapters.values()]
    expected = jax.tree.map(lambda *each: jnp.stack([each[i][b] for b, i in enumerate(INDEX)]), *alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected)
    assert not np.allclose(jax.tree.leaves(alone[0])[0], jax.tree.leaves(alone[1])[0], atol=1e-2)


def products(function, *args):
    """The FLOPs of a program's products."""
    return program.cost(function, *args).by_primitive.get("dot_general", 0)


@pytest.mark.parametrize("make", [tj.lora, tj.dora])
def test_the_base_is_multiplied_once_per_example_and_never_copied(make):
    (model, inputs), tuning = plain(), make("first", 2)
    adapters, frozen = trained(tuning, model.params)
    arguments = (stack_adapters(adapters), frozen, {}, inputs, INDEX)
    run = apply_stacked(model.apply, tuning)
    one = program.lift(lambda params, x: model.apply(params, {}, x)[0])
    alone = products(one, tuning.lifted(adapters["task 0"], frozen), inputs)
    lifting = products(lambda own: jax.tree.leaves(tuning.lifted(own, frozen)), adapters["task 0"])
    assert products(run, *arguments) == alone + len(adapters) * lifting
    sites = program.live(jax.make_jaxpr(run)(*arguments)).sites
    shapes = {tuple(getattr(v.aval, "shape", ())) for site in sites for v in site.eqn.outvars}
    kernel = model.params["first"].shape
    assert not {(len(INDEX), *kernel), (len(adapters), *kernel)} & shapes


def test_a_fresh_adapter_is_the_base_bit_for_bit_after_any_switch():
    (model, inputs), tuning = plain(), tj.chain(lora=tj.lora("first", 2), head=tj.train("second/**"))
    adapters, frozen = trained(tuning, model.params)
    adapters = {"base": tuning.init(KEY, model.params)[0], **adapters}
    for name in ("task 0", "task 2", "base"):
        merged = tuning.merge(adapters[name], frozen)
    jax.tree.map(np.testing.assert_array_equal, merged, model.params)
    run = apply_stacked(model.apply, tuning)
    found = run(stack_adapters(adapters), frozen, {}, inputs, np.array([0, 1, 0, 2, 0]))
    expected = model.apply(model.params, {}, inputs)[0]
    np.testing.assert_allclose(found[::2], expected[::2], rtol=2e-5, atol=2e-5)
    assert not np.allclose(found[1], expected[1], atol=1e-2)


def test_gradients_reach_only_the_adapters_that_are_used():
    (model, inputs), tuning = plain(), tj.lora("first", 2)
    adapters, frozen = trained(tuning, model.params)
    run = apply_stacked(model.apply, tuning)
    loss = lambda stacked: jnp.sum(run(stacked, frozen, {}, inputs, np.array([0, 2, 2, 0, 2])) ** 2)
    found = jax.grad(loss)(stack_adapters(adapters))["first"]["lora_b"]
    assert not np.any(found[1]) and np.all(np.any(found[jnp.array([0, 2])] != 0, (1, 2)))


def test_what_does_not_stack_is_named():
    model, _ = plain()
    one, _ = tj.lora("first", 2).init(KEY, model.params)
    other, _ = tj.lora("first", 3).init(KEY, model.params)
    with pytest.raises(SelectionError, match=r"expects a dict \{name: trainable\} with at least one adapter, got dict"):
        stack_adapters({})
    with pytest.raises(
        SelectionError, match=r"'first/lora_a' is \(16, 2\) float32 in 'a' and \(16, 3\) float32 in 'b'"
    ):
        stack_adapters({"a": one, "b": other})
    with pytest.raises(SelectionError, match="'a' and 'b' are trees of another outline"):
        stack_adapters({"a": one, "b": {**one, "more": None}})


def test_a_bad_index_or_batch_is_named():
    (model, inputs), tuning = plain(), tj.lora("first", 2)
    adapters, frozen = trained(tuning, model.params)
    stacked, run = stack_adapters(adapters), apply_stacked(model.apply, tuning)
    with pytest.raises(SelectionError, match="got index -1, 3 of 3 adapters, counted from 0"):
        run(stacked, frozen, {}, inputs, np.array([0, 3, -1, 1, 3]))
    traced = np.asarray(jax.jit(run)(stacked, frozen, {}, inputs, np.array([0, 3, -1, 1, 2])))
    assert np.isnan(traced).all((1, 2)).tolist() == [False, True, True, False, False]
    with pytest.raises(DataError, match=r"expects index as integers \[B\], one adapter per example"):
        run(stacked, frozen, {}, inputs, 0)
    with pytest.raises(DataError, match="expects inputs with a leading axis of 2 examples"):
        run(stacked, frozen, {}, inputs, np.array([0, 1]))
    mean = interop.pure(lambda params, x: jnp.mean(x @ params["first"]), model.params)
    with pytest.raises(DataError, match="expects outputs with a leading axis of 1 example;"):
        apply_stacked(mean.apply, tuning)(stacked, frozen, {}, inputs, INDEX)
    mixed = {"first": {**stacked["first"], "lora_b": stacked["first"]["lora_b"][:2]}, "second": stacked["second"]}
    with pytest.raises(SelectionError, match=r"expects adapters with one leading axis, got \[2, 3\] adapters"):
        run(mixed, frozen, {}, inputs, INDEX)


def test_weights_per_example_are_built_only_when_allowed():
    (model, inputs), tuning = plain(), tj.tuning.loha("first", 2)
    adapters, frozen = trained(tuning, model.params)
    with pytest.raises(SelectionError, match="a tuning without a lifted form, whose weights would be built"):
        apply_stacked(model.apply, tuning)
    found = apply_stacked(model.apply, tuning, strict=False)(stack_adapters(adapters), frozen, {}, inputs, INDEX)
    expected = model.apply(tuning.merge(adapters["task 2"], frozen), {}, inputs)[0]
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-5, atol=2e-5)
    squared = interop.pure(lambda params, x: x @ params["first"] ** 2, model.params)
    tuning = tj.lora("first", 2)
    adapters, frozen = trained(tuning, model.params)
    with pytest.raises(SelectionError, match="the lifted leaf at 'first' reaches"):
        apply_stacked(squared.apply, tuning)(stack_adapters(adapters), frozen, {}, inputs, INDEX)


def test_arguments_of_another_kind_are_named():
    model = tj.interop.pure(lambda params, x: x @ params["kernel"], {"kernel": jnp.ones((3, 2))})
    with pytest.raises(SelectionError, match=r"expects an apply function first, got Model: write model\.apply"):
        apply_stacked(model, tj.lora("kernel", 1))
    with pytest.raises(SelectionError, match=r"expects a Tuning second, got dict: write tj\.lora"):
        apply_stacked(model.apply, {})
