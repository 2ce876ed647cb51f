"""The laws of tunings catch what breaks them."""

import itertools

import jax
import jax.numpy as jnp
import pytest

import transferjax as tj
from transferjax.testing import _tuning as laws
from transferjax.testing import check_chain, check_tuning

PARAMS = {"head": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "stem": jnp.ones(4), "steps": jnp.zeros((), int)}
HEAD = tj.train("head/**")


def _init(change):
    return HEAD._replace(init=lambda key, params: change(*HEAD.init(key, params)))


def _merge(change):
    return HEAD._replace(merge=lambda trainable, frozen: change(HEAD.merge(trainable, frozen)))


def _add(tree, path, value):
    return jax.tree.map(lambda x, m: x + value if m else x, tree, tj.mask(tree, path))


def _halves(params, **selectors):
    return {name: tj.split(params, selector)[0] for name, selector in selectors.items()}


def _hole(leaf):
    return isinstance(leaf, tj.Hole)


class _Dense:
    def __init__(self, value):
        self.value = value

    def dense(self):
        return self.value


counter = itertools.count()
BROKEN = {
    "another value": (
        _merge(lambda params: _add(params, "head/bias", 0.5)),
        r"merge\(\*init\(key, params\)\) == params' is broken at 'head/bias': \(3,\) float32 differs by up to 0\.5",
    ),
    "another shape": (
        _merge(lambda params: {**params, "stem": params["stem"][None]}),
        r"merge\(\*init.* at 'stem': expected \(4,\) float32, got \(1, 4\) float32",
    ),
    "a lower dtype": (
        _merge(lambda params: {**params, "stem": params["stem"].astype(jnp.bfloat16)}),
        r"merge\(\*init.* at 'stem': expected \(4,\) float32, got \(4,\) bfloat16",
    ),
    "a lost leaf": (
        _merge(lambda params: {name: params[name] for name in ("head", "stem")}),
        r"merge\(\*init.* at 'steps': only one of the two trees has this path",
    ),
    "an integer that learns": (tj.full(), r"leaves are floating-point' is broken at 'steps': got \(\) int32"),
    "values in init": (
        _init(lambda trainable, frozen: (trainable, frozen) if float(frozen["stem"].sum()) else None),
        r"'init traces under jax\.eval_shape' is broken: it raised ConcretizationTypeError",
    ),
    "values in merge": (
        _merge(lambda params: params if float(params["stem"].sum()) else None),
        r"'merge traces under jax\.eval_shape' is broken: it raised ConcretizationTypeError",
    ),
    "a random start without the key": (
        _init(lambda trainable, frozen: (_add(trainable, "head/bias", next(counter)), frozen)),
        r"'two inits with one key are alike' is broken at '0/head/bias'",
    ),
    "a strange outline of trainable": (
        _init(lambda trainable, frozen: ([trainable], frozen)),
        r"'trainable, or each of its groups, has the outline of the parameters' is broken: got list",
    ),
    "a strange outline of frozen": (
        _init(lambda trainable, frozen: (trainable, {"stem": frozen["stem"]})),
        r"'frozen has the outline of the parameters' is broken: got a dict with the keys \['stem'\]",
    ),
    "two owners": (
        HEAD._replace(init=lambda key, params: (_halves(params, a="head/**", b="**/bias"), params)),
        r"'groups are disjoint' is broken at 'head/bias': it is in the groups 'a' and 'b'",
    ),
    "no owner": (
        _init(lambda trainable, frozen: (trainable, {**frozen, "stem": tj.Hole()})),
        r"'every leaf is trainable or frozen' is broken at 'stem': it is a Hole in both",
    ),
    "a Hole that is filled": (
        _merge(lambda params: jax.tree.map(lambda x: 0.0 if _hole(x) else x, params, is_leaf=_hole)),
        r"'a Hole that is not the tuning's stays a Hole' is broken at 'stem': expected Hole, got float",
    ),
    "a Hole that it cannot stand": (
        _merge(lambda params: {**params, "stem": params["stem"] * 1}),
        r"'a Hole that is not the tuning's stays a Hole' is broken: merge raised TypeError",
    ),
    "another lifted form": (
        HEAD._replace(lifted=lambda trainable, frozen: {**HEAD.merge(trainable, frozen), "stem": _Dense(jnp.zeros(4))}),
        r"'merge == tree\.map\(dense, lifted\)' is broken at 'stem': \(4,\) float32 differs by up to 1",
    ),
}  # fmt: skip


def test_good_tunings_pass():
    check_tuning(HEAD, PARAMS)
    lifted = lambda trainable, frozen: {**HEAD.merge(trainable, frozen), "stem": _Dense(jnp.ones(4))}
    check_tuning(HEAD._replace(lifted=lifted), PARAMS)
    check_tuning(_merge(lambda params: _add(params, "head/bias", 1e-7)), PARAMS, atol=1e-6)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_tuning_is_caught(name):
    tuning, message = BROKEN[name]
    with pytest.raises(tj.LawError, match=message):
        check_tuning(tuning, PARAMS)


def test_a_tuning_that_donates_the_parameters_is_caught():
    params = {"head": jnp.ones(2), "stem": jnp.ones(3)}
    copied = tj.copy(params)
    greedy = tj.Tuning(tj.train("head").init, lambda trainable, frozen: (_delete(params["stem"]), copied)[1])
    with pytest.raises((tj.LawError, RuntimeError)):
        check_tuning(greedy, params)


def _delete(array):
    if not array.is_deleted():
        array.delete()


def test_groups_whose_order_matters_are_caught(monkeypatch):
    good = tj.chain
    check_chain(PARAMS, a=HEAD, b=tj.train("stem"))

    def ordered(**named):
        chain, first = good(**named), next(iter(named))
        merge = lambda trainable, frozen: _add(chain.merge(trainable, frozen), "stem", 0.0 if first == "a" else 1.0)
        return chain._replace(merge=merge)

    monkeypatch.setattr(laws, "chain", ordered)
    monkeypatch.setattr(laws, "check_tuning", lambda *_, **__: None)
    with pytest.raises(tj.LawError, match=r"'the order of groups never matters \(here: b, a\)' is broken at 'stem'"):
        check_chain(PARAMS, a=HEAD, b=tj.train("stem"))
