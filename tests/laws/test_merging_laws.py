"""Every merge keeps the laws of merges."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import transferjax as tj
from transferjax import merging
from transferjax.testing._compare import require_same

KEY = jax.random.key(0)


class Method:
    """A method over a base and models.

    Attributes:
      run: ``(base, models) -> tree``.
      keeps: ``(base, model, count) -> tree``: the merge of equal models that must give the model; ``None``: ``run``.
      weighted: ``(base, models, weights) -> tree``, if it takes weights.
    """

    def __init__(self, run, keeps=None, weighted=None, moves=False):
        self.run, self.weighted, self.moves = run, weighted, moves
        self.keeps = keeps or (lambda base, model, count: run(base, [model] * count))


shares = lambda count: [1 / count] * count
grams = lambda models: [{"kernel": np.diag(1.0 + np.arange(6) + number)} for number in range(len(models))]
fishers = lambda models: [
    jax.tree.map(lambda leaf: np.abs(np.asarray(leaf, np.float32)) + 0.1, {"kernel": m["kernel"], "norm": m["norm"]})
    for m in models
]

METHODS = {
    "soup": Method(lambda b, m: merging.soup(m), weighted=lambda b, m, w: merging.soup(m, w)),
    "greedy_soup": Method(lambda b, m: merging.greedy_soup(m, lambda tree: float(np.sum(tree["kernel"])))[0]),
    "wise_ft": Method(lambda b, m: merging.wise_ft(m[0], m[1], 0.3), moves=True),
    "slerp": Method(lambda b, m: merging.slerp(m[0], m[1], 0.3), moves=True),
    "karcher": Method(lambda b, m: merging.karcher(m), weighted=lambda b, m, w: merging.karcher(m, w)),
    "task_arithmetic": Method(
        lambda b, m: merging.task_arithmetic(b, m, scale=0.5),
        keeps=lambda b, m, count: merging.task_arithmetic(b, [m] * count, shares(count)),
        weighted=lambda b, m, w: merging.task_arithmetic(b, m, w),
    ),
    "ties": Method(
        lambda b, m: merging.ties(b, m, density=0.4),
        keeps=lambda b, m, count: merging.ties(b, [m] * count, density=1.0),
        weighted=lambda b, m, w: merging.ties(b, m, w, 0.6),
    ),
    "breadcrumbs": Method(
        lambda b, m: merging.breadcrumbs(b, m, density=0.4, gamma=0.2),
        keeps=lambda b, m, count: merging.breadcrumbs(b, [m] * count, shares(count), 1.0),
        weighted=lambda b, m, w: merging.breadcrumbs(b, m, w, 0.5),
    ),
    "dare": Method(
        lambda b, m: merging.dare(b, m, None, 0.5, KEY),
        keeps=lambda b, m, count: merging.dare(b, [m] * count, shares(count), 1.0, KEY),
        weighted=lambda b, m, w: merging.dare(b, m, w, 1.0, KEY),  # masks belong to places in the list
        moves=True,
    ),
    "dare, l1": Method(
        lambda b, m: merging.dare(b, m, None, 0.5, KEY, rescale="l1"),
        keeps=lambda b, m, count: merging.dare(b, [m] * count, shares(count), 1.0, KEY, rescale="l1"),
        moves=True,
    ),
    "model_stock": Method(lambda b, m: merging.model_stock(b, m)),
    "fisher": Method(lambda b, m: merging.fisher(m, fishers(m))),
    "regmean": Method(lambda b, m: merging.regmean(m, grams(m)), moves=True),  # the grams belong to places too
}
STREAMED = {
    "soup": lambda b, m: merging.leafwise(merging.soup, m),
    "wise_ft": lambda b, m: merging.leafwise(merging.wise_ft, m[0], m[1], alpha=0.3),
    "slerp": lambda b, m: merging.leafwise(merging.slerp, m[0], m[1], t=0.3),
    "karcher": lambda b, m: merging.leafwise(merging.karcher, m),
    "task_arithmetic": lambda b, m: merging.leafwise(merging.task_arithmetic, b, m, scale=0.5),
    "ties": lambda b, m: merging.leafwise(merging.ties, b, m, density=0.4),
    "breadcrumbs": lambda b, m: merging.leafwise(merging.breadcrumbs, b, m, density=0.4, gamma=0.2),
    "dare": lambda b, m: merging.leafwise(merging.dare, b, m, None, 0.5, KEY),
    "dare, l1": lambda b, m: merging.leafwise(merging.dare, b, m, None, 0.5, KEY, rescale="l1"),
    "model_stock": lambda b, m: merging.leafwise(merging.model_stock, b, m),
    "fisher": lambda b, m: merging.leafwise(merging.fisher, m, [tj.paths(one) for one in fishers(MODELS)]),
    "regmean": lambda b, m: merging.leafwise(merging.regmean, m, grams(m)),
}
NO_MERGES = {"Merged", "leafwise", "search"}
REBASIN = {
    name
    for name in merging.__all__
    if getattr(merging, name).__module__.endswith(("_rebasin", "_permutations", "_symmetries"))
}


def model(seed):
    rng = np.random.default_rng(seed)
    return {
        "kernel": rng.standard_normal((6, 40)).astype(np.float32),
        "norm": {"scale": rng.standard_normal(9), "half": rng.standard_normal(30).astype(ml_dtypes.bfloat16)},
        "count": np.array(3, np.int32),
        "mask": np.array([True, False]),
    }


BASE, MODELS = model(0), [model(seed) for seed in (1, 2, 3)]


def floats(tree, of):
    return jax.tree.map(lambda leaf: of(leaf) if leaf.dtype.kind not in "ib" else leaf, tree)


def alike(law, expected, found, **tolerance):
    wide = lambda leaf: leaf.astype(np.float64)
    require_same(law, floats(expected, wide), floats(found, wide), **tolerance)


def test_every_method_has_its_laws():
    assert {name.split(",")[0] for name in METHODS} | NO_MERGES | REBASIN == set(merging.__all__)
    assert STREAMED.keys() == METHODS.keys() - {"greedy_soup"}


@pytest.mark.parametrize("name", METHODS)
def test_the_result_has_the_form_of_the_base(name):
    found = METHODS[name].run(BASE, MODELS)
    assert jax.tree.structure(found) == jax.tree.structure(BASE)
    for leaf, expected in zip(jax.tree.leaves(found), jax.tree.leaves(BASE), strict=True):
        assert type(leaf) is np.ndarray and (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize("name", METHODS)
def test_equal_models_give_the_model(name):
    alike("equal models give the model", MODELS[0], METHODS[name].keeps(BASE, MODELS[0], 3), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_models_that_equal_their_base_give_the_base(name):
    alike("models like the base give the base", BASE, METHODS[name].run(BASE, [BASE] * 3), rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in METHODS if not METHODS[name].moves])
def test_the_order_of_the_models_does_not_matter(name):
    run = METHODS[name].run
    alike("order", run(BASE, MODELS), run(BASE, [MODELS[n] for n in (2, 0, 1)]), rtol=1e-2, atol=1e-6)
    kernels = [{"kernel": one["kernel"], "norm": {"scale": one["norm"]["scale"]}} for one in (BASE, *MODELS)]
    first = run(kernels[0], kernels[1:])
    alike("order", first, run(kernels[0], [kernels[n] for n in (3, 1, 2)]), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].weighted])
def test_nor_does_that_of_models_and_their_weights(name):
    weighted = METHODS[name].weighted
    found = weighted(BASE, [MODELS[n] for n in (2, 0, 1)], [0.2, 0.5, 0.3])
    alike("order", weighted(BASE, MODELS, [0.5, 0.3, 0.2]), found, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_a_dict_does_not_matter(name):
    turned = [dict(reversed(one.items())) for one in MODELS]
    require_same("dict order", METHODS[name].run(BASE, MODELS), METHODS[name].run(BASE, turned))


@pytest.mark.parametrize("name", METHODS)
def test_what_is_given_stays_as_it_was(name):
    trees = [BASE, *MODELS]
    before = jax.tree.map(np.copy, trees)
    found = METHODS[name].run(BASE, MODELS)
    require_same("inputs stay", before, trees)
    shared = [path for path, leaf in tj.paths(found).items() if leaf.dtype.kind not in "ib"
              for one in trees if np.shares_memory(leaf, tj.paths(one)[path])]  # fmt: skip
    assert shared == []


@pytest.mark.parametrize("name", METHODS)
def test_equal_calls_give_equal_bits(name):
    require_same("equal calls", METHODS[name].run(BASE, MODELS), METHODS[name].run(BASE, MODELS))


@pytest.mark.parametrize("name", STREAMED)
def test_checkpoints_leaf_by_leaf_give_the_bits_of_trees_in_memory(name, checkpoints):
    streamed = STREAMED[name](checkpoints[0], checkpoints[1:])
    found = tj.tree.nest({path: streamed[path] for path in streamed})
    require_same("streaming is merging in memory", METHODS[name].run(BASE, MODELS), found)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merging")
    out = []
    for number, tree in enumerate((BASE, *MODELS)):
        tj.io.save(folder / f"{number}.npz", tree)
        out.append(tj.io.open(folder / f"{number}.npz"))
    return out


@pytest.mark.parametrize("name", METHODS)
def test_jax_arrays_give_jax_arrays_of_the_same_bits(name):
    keep = lambda tree: {"kernel": tree["kernel"], "norm": {"half": tree["norm"]["half"]}, "count": tree["count"]}
    base, models = keep(BASE), [keep(one) for one in MODELS]
    found = METHODS[name].run(*jax.tree.map(jnp.asarray, (base, models)))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))
    require_same("JAX arrays", METHODS[name].run(base, models), jax.tree.map(np.asarray, found))


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"greedy_soup", "fisher"}))
def test_under_jit_it_is_the_same_to_rounding(name):
    keep = lambda tree: {"kernel": tree["kernel"], "norm": {"half": tree["norm"]["half"]}, "count": tree["count"]}
    base, models = keep(BASE), [keep(one) for one in MODELS]
    traced = jax.jit(METHODS[name].run)(base, models)
    alike("jit", METHODS[name].run(base, models), jax.tree.map(np.asarray, traced), rtol=1e-2, atol=2e-5)
    kernel = METHODS[name].run(base, models)["kernel"]
    np.testing.assert_allclose(traced["kernel"], kernel, rtol=2e-4, atol=2e-5)
