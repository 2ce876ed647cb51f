"""Weight decay towards the source."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax.optim import TowardsState, decay_towards

RNG = np.random.default_rng(0)
SOURCE = {
    "head": {"kernel": RNG.normal(size=(4, 2)).astype(np.float32)},
    "stem": {"kernel": RNG.normal(size=(3, 4)).astype(np.float32)},
}
PARAMS = jax.tree.map(lambda x: jnp.asarray(x) + 0.5, SOURCE)
BATCH = {"inputs": jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32), "labels": jnp.arange(8) % 2}


def apply(params, extra, inputs, *, key=None, train=False):
    return jnp.tanh(inputs @ params["stem"]["kernel"]) @ params["head"]["kernel"], extra


MODEL = tj.Model(apply, None, PARAMS, {})
LOSS = tj.objectives.cross_entropy(apply)


def train(tx, tuning, steps=3, objective=LOSS):
    state, frozen = tj.init(jax.random.key(0), MODEL, tuning, tx)
    step = tj.make_step(objective, tuning, tx)
    for _ in range(steps):
        state, _ = step(state, frozen, BATCH)
    return tj.copy(state), tuning.merge(state.trainable, frozen)


def test_it_adds_the_distance_to_the_first_values():
    tx = decay_towards(0.5)
    start = {"a": jnp.array([1.0, 2.0]), "b": tj.Hole()}
    state = tx.init(start)
    assert isinstance(state, TowardsState) and state.reference["a"] is not start["a"]
    updates, after = tx.update({**start, "a": jnp.array([10.0, 20.0])}, state, {**start, "a": jnp.array([3.0, 2.0])})
    assert updates["a"].tolist() == [11.0, 20.0] and after is state
    still, _ = tx.update(start, state, start)
    assert still["a"].tolist() == start["a"].tolist()


def reference_sgd(steps=3):
    """Three steps of SGD on the loss plus .3 / 2 ||w - source||^2."""

    def value(params):
        far = jax.tree.map(lambda w, s: jnp.sum((w - s) ** 2), params, SOURCE)
        return LOSS(params, {}, BATCH, None, True).value + 0.15 * sum(jax.tree.leaves(far))

    params = PARAMS
    for _ in range(steps):
        params = jax.tree.map(lambda w, g: w - 0.2 * g, params, jax.grad(value)(params))
    return params


@pytest.mark.parametrize(
    "tuning",
    [tj.full(), tj.chain(all=tj.full()), tj.chain(stem=tj.train("head/**"), head=tj.train("stem/**"))],
    ids=["plain", "group", "swapped names"],
)
def test_in_front_of_sgd_it_is_the_gradient_of_l2_sp(tuning):
    _, params = train(optax.chain(decay_towards(0.3, SOURCE), optax.sgd(0.2)), tuning)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, reference_sgd())


def test_behind_adam_it_is_decoupled():
    adamw = optax.adamw(0.1, weight_decay=0.3)
    zero = jax.tree.map(np.zeros_like, SOURCE)
    ours = optax.chain(optax.scale_by_adam(), decay_towards(0.3, zero), optax.scale_by_learning_rate(0.1))
    found = [train(tx, tj.full())[1] for tx in (ours, adamw)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *found)


def test_in_one_group_the_reference_is_of_that_group_alone():
    tuning = tj.chain(head=tj.train("head/**"), low=tj.lora("stem/kernel", 2))
    tx = tj.per_group(head=optax.chain(decay_towards(0.3, SOURCE), optax.sgd(0.1)), low=optax.sgd(0.1))
    state, _ = train(tx, tuning)
    kept = tj.paths(state.opt_state["head"])
    assert list(kept) == ["0/reference/head/kernel"]
    np.testing.assert_array_equal(kept["0/reference/head/kernel"], SOURCE["head"]["kernel"])
    everything = optax.chain(decay_towards(0.3), optax.sgd(0.1))
    assert len(tj.paths(train(everything, tuning)[0].opt_state)) == 3


def test_params_of_an_extended_model_are_found_in_a_source_that_is_not():
    extended = {"model": PARAMS, "aux": {"projector": jnp.ones(2)}}
    trainable, _ = tj.train("model/**").init(jax.random.key(0), extended)
    found = tj.paths(decay_towards(0.1, SOURCE).init(trainable))
    np.testing.assert_array_equal(found["reference/model/stem/kernel"], SOURCE["stem"]["kernel"])


def test_the_reference_takes_the_dtype_of_what_learns_and_strength_may_be_traced():
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), SOURCE)

    @jax.jit
    def first(strength):
        tx = decay_towards(strength, SOURCE)
        state = tx.init(half)
        return tx.update(half, state, half)[0], state.reference

    updates, reference = first(0.7)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), (updates, reference), (half, half))
    assert reference["stem"]["kernel"].dtype == jnp.bfloat16


def test_a_leaf_without_its_like_in_the_reference_raises():
    tuning = tj.chain(head=tj.train("head/**"), low=tj.lora("stem/kernel", 2))
    message = (
        r"decay_towards\(\) has no reference for 2 of 3 trainable leaves: stem/kernel/lora_a, stem/kernel/lora_b\. Put"
    )
    with pytest.raises(tj.SelectionError, match=message):
        train(decay_towards(0.1, SOURCE), tuning)
    other = {**SOURCE, "head": {"kernel": np.zeros((4, 1000), np.float32)}}
    message = r"'head/kernel' is \(4, 2\) float32 and its reference \(4, 1000\) float32\. Expected equal shapes"
    with pytest.raises(tj.SelectionError, match=message):
        train(decay_towards(0.1, other), tj.full())


@pytest.mark.parametrize("strength", [-0.1, "0.1", None, True, float("nan")])
def test_a_bad_strength_raises(strength):
    with pytest.raises(tj.SelectionError, match=r"decay_towards\(\) expects strength as a number of at least 0, got"):
        decay_towards(strength)


def test_a_model_as_reference_or_no_params_raises():
    with pytest.raises(tj.SelectionError, match=r"expects params as reference, got a Model: write reference=model\."):
        decay_towards(0.1, MODEL)
    tx = decay_towards(0.1)
    with pytest.raises(tj.TransferError, match=r"decay_towards\(\) needs the parameters: call tx\.update"):
        tx.update(PARAMS, tx.init(PARAMS))
