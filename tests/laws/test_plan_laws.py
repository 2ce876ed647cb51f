"""Every plan is total, minimal, deterministic, order-independent, exact as JSON, and does what its operations say."""

import dataclasses
import json
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from transferjax import Model, regex
from transferjax._errors import LawError, PlanError
from transferjax.surgery import (
    Plan,
    assemble,
    cast,
    dots_to_slashes,
    fresh,
    leaves,
    permute,
    plan,
    rename,
    reshape,
    torch_layout,
    waive,
)
from transferjax.testing import _plan as law
from transferjax.testing import check_plan
from transferjax.tree import nest

LITE0 = Path(__file__).parents[1] / "fixtures" / "surgery" / "efficientnet_lite0.json"
S = jax.ShapeDtypeStruct
WIDER = {"float16": "float32", "int8": "int32", "int32": "float32", "bfloat16": "float32", "bool": "int8"}


def exactly(path):
    return regex(re.escape(path))


@st.composite
def surgeries(draw):
    """`(source, target, rules)`: a random target, and a random source that its rules lead to it."""
    names = st.from_regex(r"[a-z]{1,3}(/[a-z0-9]{1,2}){0,2}", fullmatch=True)
    outline = draw(st.sets(names, min_size=1, max_size=6))
    outline = sorted(p for p in outline if not any(q != p and q.startswith(p + "/") for q in outline))
    source, target, rules = {}, {}, []
    for number, path in enumerate(outline):
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
        dtype = draw(st.sampled_from(sorted(WIDER)))
        name = draw(st.sampled_from([path, f"layer.{number}.w", f"net/{number}.b"]))
        came, made = shape, dtype
        if draw(st.booleans()) and len(shape) > 1:
            axes = tuple(draw(st.permutations(range(len(shape)))))
            if axes != tuple(range(len(shape))):
                rules.append(permute(exactly(path), axes))
                shape = tuple(shape[a] for a in axes)
        if draw(st.booleans()) and len(shape) > 1:
            rules.append(reshape(exactly(path), (int(np.prod(shape)),)))
            shape = (int(np.prod(shape)),)
        if draw(st.booleans()):
            made = WIDER[dtype]
            rules.append(cast(exactly(path), made))
        target[path] = S(shape, jnp.dtype(made))
        if draw(st.integers(0, 4)) == 0:
            rules = [rule for rule in rules if getattr(rule, "selector", None) != exactly(path)]
            rules.append(fresh(exactly(path)))
            continue
        source[name] = S(came, jnp.dtype(dtype))
        if name != path:
            rules.append(rename(re.escape(name), path))
    for number in range(draw(st.integers(0, 2))):
        source[f"buffer.{number}.n"] = S((number,), np.dtype("int32"))
        rules.append(waive(f"buffer.{number}.*"))
    return source, nest(target), rules


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(surgeries())
def test_random_surgeries_keep_the_laws(surgery):
    check_plan(*surgery)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(surgeries(), st.data())
def test_a_leaf_more_or_less_never_passes(surgery, data):
    source, target, rules = surgery
    with pytest.raises(PlanError, match=r"source 'never' .* has no target"):
        plan({**source, "never": S((1,), np.dtype("float32"))}, target, *rules)
    with pytest.raises(PlanError, match=r"target 'never' .* has no source"):
        plan(source, {**target, "never": S((1,), np.dtype("float32"))}, *rules)
    if source:
        gone = data.draw(st.sampled_from(sorted(source)))
        with pytest.raises(PlanError):
            plan({name: leaf for name, leaf in source.items() if name != gone}, target, *rules)


def torch_source():
    f, i = np.dtype("float32"), np.dtype("int64")
    shapes = {"conv.weight": (4, 3, 3, 3), "conv.bias": (4,), "bn.weight": (4,), "bn.bias": (4,),
              "bn.running_mean": (4,), "bn.running_var": (4,), "fc.weight": (5, 4), "fc.bias": (5,)}  # fmt: skip
    return {**{name: S(shape, f) for name, shape in shapes.items()}, "bn.num_batches_tracked": S((), i)}


NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
RULES = (
    rename(r"(conv|fc)\.weight", r"\1/kernel"),
    rename(r"bn\.(weight|bias|running_mean|running_var)", lambda m: f"bn/{NORM[m[1]]}"),
    dots_to_slashes(),
    torch_layout(),
    waive("*.num_batches_tracked"),
)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)
        self.fc = nnx.Linear(4, 5, rngs=rngs)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=True, name="bn")(x)
        return nn.Dense(5, name="fc")(x.mean((1, 2)))


def nnx_module():
    return NnxNet(nnx.Rngs(0))


def nnx_state():
    return nnx.state(nnx_module())


def linen_model():
    variables = jax.eval_shape(lambda: LinenNet().init(jax.random.key(0), jnp.zeros((1, 8, 8, 3))))
    return Model(None, None, variables["params"], variables["batch_stats"])


def dict_tree():
    return nest({path: S(leaf.shape, leaf.dtype) for path, leaf in leaves(nnx_state()).items()})


@pytest.mark.parametrize("target", [nnx_module, nnx_state, linen_model, dict_tree], ids=lambda f: f.__name__)
def test_the_laws_hold_for_every_kind_of_target(target):
    made = check_plan(torch_source(), target(), RULES)
    assert made.counts() == {"copied": 6, "transformed": 2, "fresh": 0, "waived": 1}
    assert [move.target for move in made.moves][:2] == ["bn/bias", "bn/mean"]


def test_a_module_computes_with_what_was_put_into_it():
    module = nnx_module()
    arrays = {n: np.full(s.shape, 2, s.dtype) for n, s in torch_source().items()}
    out = assemble(module, plan(torch_source(), module, *RULES).apply(arrays))
    assert np.array_equal(out.fc(jnp.ones((1, 4))), np.full((1, 5), 10.0))


def test_lite0_names_keep_the_laws():
    source = {n: S(shape, np.dtype(dtype)) for n, (shape, dtype) in json.loads(LITE0.read_text()).items()}
    keep = {n: s for n, s in source.items() if n.startswith(("_blocks.1.", "_conv_head", "_fc"))}
    target = {n.replace(".", "/"): S(s.shape, s.dtype) for n, s in keep.items() if "tracked" not in n}
    for path, leaf in target.items():
        axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(len(leaf.shape))
        target[path] = S(tuple(leaf.shape[a] for a in axes), leaf.dtype) if axes else leaf
    matrices = regex(r".*conv/weight|_conv_head/weight|_fc/weight")
    check_plan(keep, nest(target), [dots_to_slashes(), torch_layout(matrices), waive("**.num_batches_tracked")])


# The law itself notices a plan that breaks it ------------------------------------------------------------------------


def broken(**changes):
    made = plan({"w": S((2, 3), np.dtype("float32"))}, {"k": S((3, 2), np.dtype("float32"))},
                rename("w", "k"), permute("k", (1, 0)))  # fmt: skip
    return dataclasses.replace(made, **changes)


def test_the_law_sees_an_idle_rule(monkeypatch):
    source, target = {"w": S((2,), np.dtype("float32"))}, {"w": S((2,), np.dtype("float32"))}
    made = plan(source, target)
    monkeypatch.setattr(law, "plan", lambda s, t, *rules: made)
    with pytest.raises(LawError, match=r"the plan is not minimal: cast\('w', 'float32'\) can be removed"):
        check_plan(source, target, [cast("w", "float32")])
    with pytest.raises(LawError, match=r"the plan is not minimal: rename\('w', 'w'\) can be removed"):
        check_plan(source, target, [rename("w", "w")])


def test_the_law_sees_what_is_not_accounted_for(monkeypatch):
    source, target = {"w": S((2, 3), np.dtype("float32"))}, {"k": S((3, 2), np.dtype("float32"))}
    for changes, message in [
        ({"moves": ()}, "the plan is not total: targets without one move: k"),
        ({"waived": ("w",)}, "the plan is not total: sources not read or waived, or both: w"),
    ]:
        monkeypatch.setattr(law, "plan", lambda *_, c=changes: broken(**c))
        with pytest.raises(LawError, match=message):
            check_plan(source, target)


def test_the_law_sees_wrong_arrays_and_wrong_json(monkeypatch):
    source, target = {"w": S((2, 3), np.dtype("float32"))}, {"k": S((3, 2), np.dtype("float32"))}
    rules = [rename("w", "k"), permute("k", (1, 0))]
    with monkeypatch.context() as patch:
        patch.setattr(Plan, "apply", lambda self, read, init: {"k": read("w").reshape(3, 2)})
        with pytest.raises(LawError, match="the plan is not applied: 'k' differs from its numpy operations"):
            check_plan(source, target, rules)
    with monkeypatch.context() as patch:
        patch.setattr(Plan, "from_json", staticmethod(lambda text: broken(waived=("w",))))
        with pytest.raises(LawError, match="the plan is not its JSON"):
            check_plan(source, target, rules)


def test_the_law_sees_an_inverse_that_is_none(monkeypatch):
    source, target = {"w": S((2, 2), np.dtype("float32"))}, {"w": S((2, 2), np.dtype("float32"))}
    wrong = plan({"w": S((2, 2), np.dtype("float32"))}, source, permute("w", (1, 0)))
    monkeypatch.setattr(Plan, "inverse", lambda self: wrong)
    with pytest.raises(LawError, match="the plan is not undone by its inverse: 'w' comes back as another"):
        check_plan(source, target)


def test_the_law_sees_chance_and_order(monkeypatch):
    source, target = {"w": S((2, 3), np.dtype("float32"))}, {"k": S((3, 2), np.dtype("float32"))}
    calls = iter([broken(), broken(fingerprint="a")])
    monkeypatch.setattr(law, "plan", lambda *_: next(calls))
    with pytest.raises(LawError, match="the plan is not deterministic"):
        check_plan(source, target)
    calls = iter([broken(), broken(), broken(fingerprint="a")])
    with pytest.raises(LawError, match="the plan is not independent of dict order"):
        check_plan(source, target)
    calls = iter([broken(), broken(), broken(), broken(fingerprint="a")])
    with pytest.raises(LawError, match="the plan is not independent of the order of its rules"):
        check_plan(source, target)
