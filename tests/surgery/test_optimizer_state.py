"""The optimizer's state follows its parameters: exactly where numbers are rearranged, afresh and told elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import transferjax as tj
from transferjax._errors import PlanError
from transferjax.surgery import (
    Move,
    Plan,
    Spec,
    _optimizer_state,
    assemble,
    cast,
    fresh,
    fuse,
    leaves,
    permute,
    plan,
    rename,
    reshape,
    split,
    stack,
    tie,
    unstack,
    waive,
)
from transferjax.tree import paths

carry = _optimizer_state.carry
OLD = {"stem": {"weight": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "fc": {"weight": jnp.ones((5, 3))}}
NEW = {"body": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(3)}, "head": {"kernel": jnp.ones((3, 4))}}
RULES = (
    rename(r"stem/weight", "body/kernel"),
    rename(r"stem/bias", "body/bias"),
    permute("body/kernel", (1, 0)),
    fresh("head/kernel"),
    waive("fc/weight"),
)


def made():
    return plan(OLD, NEW, *RULES)


def run(tx, params):
    """A state as after some steps: random moments, counts of 3."""
    rng = np.random.default_rng(0)

    def fill(leaf):
        value = rng.uniform(0.1, 1.0, leaf.shape) if jnp.issubdtype(leaf.dtype, jnp.floating) else 3
        return jnp.asarray(np.full(leaf.shape, value, leaf.dtype))

    return jax.tree.map(fill, jax.eval_shape(tx.init, params))


def how(report):
    return {(row["state"], row["leaf"] or row["source"]): row["how"] for row in report.to_dicts()}


def same(a, b):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_moments_are_rearranged_and_all_else_is_told():
    tx = optax.adamw(1e-3)
    before, first = run(tx, OLD), tx.init(NEW)
    state, report = carry(made(), before, first)
    assert jax.tree.structure(state) == jax.tree.structure(first)
    for part in ("mu", "nu"):
        was, now = getattr(before[0], part), getattr(state[0], part)
        same(now["body"]["kernel"], was["stem"]["weight"].T)
        same(now["body"]["bias"], was["stem"]["bias"])
        same(now["head"]["kernel"], jnp.zeros((3, 4)))
    assert int(state[0].count) == 3
    assert how(report) == {
        ("0/count", None): "carried",
        ("0/mu", "body/bias"): "copy",
        ("0/mu", "body/kernel"): "permute(1, 0)",
        ("0/mu", "head/kernel"): "new: fresh leaf",
        ("0/nu", "body/bias"): "copy",
        ("0/nu", "body/kernel"): "permute(1, 0)",
        ("0/nu", "head/kernel"): "new: fresh leaf",
        ("0/mu", "fc/weight"): "dropped: waived by the plan",
        ("0/nu", "fc/weight"): "dropped: waived by the plan",
    }
    assert report.metadata == {"carried": 5, "new": 2, "dropped": 2, "shared counts": "0/count"}
    assert report.title == "Carry: 5 of 7 leaves of the state are carried over"


def test_an_update_with_the_carried_state_is_the_old_update_rearranged():
    """The law that matters: surgery, then a step, is a step, then surgery."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1))
    old = {"stem": OLD["stem"]}
    new = {"body": NEW["body"]}
    moves = plan(old, new, *RULES[:3])
    gradient = jax.tree.map(lambda p: jax.random.normal(jax.random.key(9), p.shape), old)
    there = lambda tree: assemble(new, moves.apply(leaves(tree)))
    before = run(tx, old)
    state, _ = carry(moves, before, tx.init(new))
    one, _ = tx.update(gradient, before, old)
    two, _ = tx.update(there(gradient), state, there(old))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), there(one), two)


@pytest.mark.parametrize(
    ("source", "target", "rules"),
    [
        ({"qkv": (6, 2)}, {"q": (2, 2), "k": (2, 2), "v": (2, 2)}, [split("qkv", ("q", "k", "v"), axis=0)]),
        ({"q": (1, 2), "k": (3, 2)}, {"qk": (2, 4)}, [fuse(("q", "k"), "qk", axis=0), permute("qk", (1, 0))]),
        ({"b0": (2, 3), "b1": (2, 3)}, {"layers": (2, 6)},
         [stack(r"b(?P<i>\d)", "layers"), reshape("layers", (2, 6))]),
        ({"layers": (2, 3)}, {"b0": (3,), "b1": (3,)}, [unstack("layers", "b{i}")]),
        ({"e": (3, 2)}, {"e": (3, 2), "h": (2, 3)}, [tie("h", "e"), permute("h", (1, 0))]),
    ],
)  # fmt: skip
def test_every_rearrangement_applies_to_moments_as_to_parameters(source, target, rules):
    old, new = ({n: jnp.ones(shape) for n, shape in side.items()} for side in (source, target))
    moves, tx = plan(old, new, *rules), optax.adam(1e-3)
    before = run(tx, old)
    state, report = carry(moves, before, tx.init(new))
    for part in ("mu", "nu"):
        wanted = moves.apply(getattr(before[0], part))
        jax.tree.map(same, getattr(state[0], part), wanted)
    assert report.metadata["new"] == report.metadata["dropped"] == 0


OPTIMIZERS = {
    "multi_steps": optax.MultiSteps(optax.adam(1e-3), 2),
    "partition": optax.partition({"a": optax.adam(1e-3), "b": optax.sgd(0.1, momentum=0.9)},
                                 lambda p: jax.tree.map(lambda x: "a" if x.ndim == 2 else "b", p)),
    "masked": optax.masked(optax.adam(1e-3), lambda p: jax.tree.map(lambda x: x.ndim == 2, p)),
    "schedule": optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda n: -0.1 * n)),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "lion": optax.lion(1e-3),
    "ema": optax.ema(0.9),
    "finite": optax.apply_if_finite(optax.adam(1e-3), 3),
    "schedule_free": optax.contrib.schedule_free_adamw(0.1),
    "groups": tj.per_group(stem=optax.adam(1e-3), body=optax.adam(1e-3)),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optax_state_round_trips_through_a_plan_and_back(name):
    tx = OPTIMIZERS[name]
    old, new = {"stem": OLD["stem"]}, {"body": NEW["body"]}
    there = plan(old, new, *RULES[:3])
    back = plan(new, old, rename("body/kernel", "stem/weight"), rename("body/bias", "stem/bias"),
                permute("stem/weight", (1, 0)))  # fmt: skip
    if name == "groups":
        old, new = ({"stem": tree, "body": tree} for tree in (old, new))
    before = run(tx, old)
    state, report = carry(there, before, tx.init(new))
    assert report.metadata == {"carried": len(jax.tree.leaves(before)), "new": 0, "dropped": 0}
    again, _ = carry(back, state, tx.init(old))
    assert jax.tree.structure(again) == jax.tree.structure(before)
    jax.tree.map(same, again, before)
    moved = [p for p, leaf in paths(before).items() if p.endswith("stem/weight") and leaf.shape == (2, 3)]
    for path in moved:
        same(paths(state)[path.removesuffix("stem/weight") + "body/kernel"], paths(before)[path].T)
    assert moved


def test_factored_moments_keep_their_new_values():
    tx = optax.adafactor(1e-3, min_dim_size_to_factor=2)
    _, report = carry(made(), run(tx, OLD), tx.init(NEW))
    told = how(report)
    assert told[("0/v_row", "body/kernel")] == told[("0/v", "body/kernel")] == "new: not of its parameter's shape"
    assert told[("0/v", "body/bias")] == "copy" and told[("0/count", None)] == "carried"
    assert report.metadata["shared counts"] == "0/count"


def test_resized_leaves_keep_their_new_values():
    old, new = {"embed": jnp.ones((4, 2)), "w": jnp.ones(2)}, {"embed": jnp.ones((5, 2)), "w": jnp.ones(2)}
    f = "float32"
    moves = Plan(
        (Move("embed", "embed", (("resize_rows", 5, "mean", None, 0),)), Move("w", "w")), (),
        {"embed": Spec((5, 2), f), "w": Spec((2,), f)}, {"embed": Spec((4, 2), f), "w": Spec((2,), f)},
    )  # fmt: skip
    tx = optax.adam(1e-3)
    state, report = carry(moves, run(tx, old), tx.init(new))
    assert "new: resize_rows is no rearrangement" in report.column("how")
    same(state[0].nu["embed"], jnp.zeros((5, 2)))


def test_groups_of_new_leaves_start_their_own_count():
    """Adam's correction of its first steps is right for carried and for new leaves, when these are a group."""
    tx = tj.per_group(head=optax.adam(1e-3), body=optax.adam(1e-3))
    old = {"head": {"fc": OLD["fc"]}, "body": {"stem": OLD["stem"]}}
    new = {"head": {"head": NEW["head"]}, "body": {"body": NEW["body"]}}
    state, report = carry(made(), run(tx, old), tx.init(new))
    assert int(state["body"][0].count) == 3 and int(state["head"][0].count) == 0
    assert how(report)[("head/0/count", None)] == "new: all leaves beside it are new"
    assert "shared counts" not in report.metadata


def test_what_a_shared_count_costs_is_as_the_docstring_says():
    tx = optax.adam(1.0)
    _, state = tx.update({"w": jnp.ones(())}, tx.init({"w": jnp.ones(())}))
    inner = state[0]._replace(count=jnp.asarray(100_000), mu={"w": jnp.zeros(())}, nu={"w": jnp.zeros(())})
    state, sizes = (inner, *state[1:]), []
    for _ in range(40):
        updates, state = tx.update({"w": jnp.ones(())}, state)
        sizes.append(-float(updates["w"]))
    assert 6.5 < max(sizes) < 6.6


def test_leaves_that_had_no_state_are_new_and_holes_stay_holes():
    model = lambda tree: tj.Model(None, None, tree, {})
    rules = (rename(r"(.*)/w", r"\1/kernel"),)
    old = {name: {"w": jnp.ones((2, 2))} for name in ("a", "b", "c")}
    new = {name: {"kernel": jnp.ones((2, 2))} for name in ("a", "b", "c")}
    tx = optax.adam(1e-3)
    before, _ = tj.init(jax.random.key(0), model(old), tj.train("{a,b}/**"), tx)
    first, _ = tj.init(jax.random.key(0), model(new), tj.train("{b,c}/**"), tx)
    nu = jax.tree.map(lambda x: x + 7, before.opt_state[0].nu)
    state, report = carry(plan(old, new, *rules), (before.opt_state[0]._replace(nu=nu), ()), first.opt_state)
    assert jax.tree.structure(state) == jax.tree.structure(first.opt_state)
    told = how(report)
    assert told[("0/nu", "c/kernel")] == "new: c/w had no state" and told[("0/nu", "b/kernel")] == "copy"
    assert told[("0/nu", "a/w")] == "dropped: no leaf takes it"
    same(state[0].nu["b"]["kernel"], jnp.full((2, 2), 7.0))


def test_moments_keep_the_dtype_of_the_new_state():
    old, new = {"w": jnp.ones(2)}, {"w": jnp.ones(2, jnp.bfloat16)}
    moves = plan(old, new, cast("w", "bfloat16"))
    tx = optax.adam(1e-3, mu_dtype=jnp.float32)
    state, report = carry(moves, run(tx, old), tx.init(new))
    assert state[0].mu["w"].dtype == jnp.float32 and state[0].nu["w"].dtype == jnp.bfloat16
    assert how(report)[("0/mu", "w")] == "copy"
    huge = run(tx, old)[0]._replace(nu={"w": jnp.full(2, 1e38)})
    half = (tx.init(old)[0]._replace(nu={"w": jnp.zeros(2, jnp.float16)}), ())
    with pytest.raises(PlanError, match="'0/nu/w' from 'w': cast from float32 to float16 makes 2 of 2 values infinite"):
        carry(plan(old, old), (huge, ()), half)


def test_names_of_parameters_that_are_names_of_the_state_are_told_apart():
    params = {"mu": {"w": jnp.ones(2)}, "w": jnp.ones(3), "count": jnp.ones(4), "0": {"nu": jnp.ones(5)}}
    tx = optax.adam(1e-3)
    before = run(tx, params)
    state, report = carry(plan(params, params), before, tx.init(params))
    jax.tree.map(same, state, before)
    assert report.metadata["carried"] == 9
    assert {row["state"] for row in report.to_dicts()} == {"0/count", "0/mu", "0/nu"}


def test_arrays_are_copies_that_can_be_donated():
    old = {"e": jnp.ones((2, 2))}
    new = {"e": jnp.ones((2, 2)), "h": jnp.ones((2, 2))}
    tx = optax.adam(1e-3)
    before, first = run(tx, old), tx.init(new)
    state, _ = carry(plan(old, new, tie("h", "e")), before, first)
    jax.block_until_ready(jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((before, first)))


def test_a_carried_leaf_lies_where_the_new_one_lies():
    mesh = jax.make_mesh((len(jax.devices()),), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    there = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    tx = optax.adam(1e-3)
    first = jax.device_put(tx.init(NEW), there)
    state, _ = carry(made(), run(tx, OLD), first)
    assert all(leaf.sharding == there for leaf in jax.tree.leaves(state))


def test_it_traces():
    tx = optax.adam(1e-3)
    before, first = run(tx, OLD), tx.init(NEW)
    state = jax.jit(lambda a, b: carry(made(), a, b)[0])(before, first)
    jax.tree.map(same, state, carry(made(), before, first)[0])


def test_an_average_of_parameters_is_a_tree_like_them():
    average = jax.tree.map(lambda x: 0.5 * x, OLD)
    out, report = carry(made(), average, NEW)
    same(out["body"]["kernel"], jnp.full((3, 2), 0.5))
    same(out["head"]["kernel"], NEW["head"]["kernel"])
    assert report.to_dicts()[1] == {"state": "", "leaf": "body/kernel", "shape": "(3, 2)", "source": "stem/weight",
                                    "how": "permute(1, 0)"}  # fmt: skip
    jax.tree.map(same, out, assemble(NEW, made().apply(leaves(average), leaves(NEW))))


def test_the_state_of_an_nnx_optimizer_is_carried_as_it_is():
    linear = lambda name, **made: type(name, (nnx.Module,), {"__init__": lambda self: vars(self).update(made)})()
    old, new = (linear("Net", **{name: nnx.Linear(2, 3, rngs=nnx.Rngs(0))}) for name in ("a", "b"))
    tx = optax.adam(1e-3)
    before, first = (nnx.Optimizer(module, tx, wrt=nnx.Param) for module in (old, new))
    moves = plan(*(nnx.state(module, nnx.Param) for module in (old, new)), rename(r"a/(.*)", r"b/\1"))
    filled = jax.tree.map(lambda x: x + 3, nnx.state(before))
    state, report = carry(moves, filled, nnx.state(first))
    nnx.update(first, state)
    same(first.opt_state[0].mu["b"]["kernel"][...], jnp.full((2, 3), 3.0))
    assert int(first.step[...]) == 3 and report.metadata == {"carried": 6, "new": 0, "dropped": 0}


def test_a_state_without_arrays_stays():
    state, report = carry(made(), optax.sgd(0.1).init(OLD), optax.sgd(0.1).init(NEW))
    assert state == optax.sgd(0.1).init(NEW) and report.rows == ()


ADAM = optax.adam(1e-3)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (lambda: optax.sgd(0.1, momentum=0.9).init(OLD), lambda: ADAM.init(NEW),
         r"the two states differ in their parts: '0/trace' \(in old_state only\), '0/mu' \(in new_state only\)"),
        (lambda: optax.adam(lambda n: 1e-3).init(OLD), lambda: ADAM.init(NEW),
         r"the two states differ in their numbers: '1/count' \(in old_state only\)"),
        (lambda: (ADAM.init(OLD)[0]._replace(count=np.zeros(2, np.int32)), ()), lambda: ADAM.init(NEW),
         r"'0/count' is \(2,\) int32 in old_state and \(\) int32 in new_state; expected the same"),
        (lambda: ADAM.init({**OLD, "stem": {"weight": jnp.ones((3, 2)), "bias": jnp.ones(3)}}), lambda: ADAM.init(NEW),
         r"'0/mu' of old_state has \(3, 2\) float32 for 'stem/weight'; the plan was made for \(2, 3\) float32."),
        (lambda: ADAM.init(OLD), lambda: ADAM.init({**NEW, "body": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(3)}}),
         r"'0/mu' of new_state has \(3, 4\) float32 for 'body/kernel'; the plan was made for \(3, 2\) float32."),
        (lambda: ADAM.init({**OLD, "more": jnp.ones(2)}), lambda: ADAM.init(NEW),
         r"'0/mu/fc/weight' of the state belongs to 'fc/weight', and what lies there is not the plan's leaves alone"),
        (lambda: ADAM.init(OLD), lambda: ADAM.init({"body": {"kernel": {"lora_a": jnp.ones((3, 2))}}}),
         r"'0/mu/body/kernel/lora_a' of the state belongs to 'body/kernel', and what lies there"),
        (lambda: ADAM.init(OLD), lambda: jax.eval_shape(ADAM.init, NEW),
         r"'0/mu/head/kernel' keeps its value in new_state, which is a jax.ShapeDtypeStruct"),
        (lambda: jax.eval_shape(ADAM.init, OLD), lambda: ADAM.init(NEW),
         r"'0/count' of old_state is a jax.ShapeDtypeStruct. Pass the arrays of the old run."),
    ],
)  # fmt: skip
def test_states_that_do_not_fit_say_what_to_write(old, new, message):
    with pytest.raises(PlanError, match=message):
        carry(made(), old(), new())


def test_the_public_name():
    assert tj.surgery.carry is carry
