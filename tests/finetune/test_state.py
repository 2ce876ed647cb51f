"""The first state of a run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax._types import is_hole


def _model(params):
    return tj.Model(None, None, params, {})


def test_the_state_holds_copies_of_what_learns_and_nothing_frozen(model):
    state, frozen = tj.init(jax.random.key(0), model, tj.train("head/**"), optax.adam(1e-3))
    assert list(tj.paths(state)) == [
        "extra/seen", "key", "opt_state/0/count", "opt_state/0/mu/head/bias", "opt_state/0/mu/head/kernel",
        "opt_state/0/nu/head/bias", "opt_state/0/nu/head/kernel", "step", "trainable/head/bias",
        "trainable/head/kernel",
    ]  # fmt: skip
    assert is_hole(state.trainable["stem"]["kernel"]) and is_hole(frozen["head"]["bias"])
    assert frozen["stem"]["kernel"] is model.params["stem"]["kernel"]
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((model.params, model.extra))]
    for leaf in jax.tree.leaves((state.trainable, state.extra, state.opt_state, state.step)):
        pointers.append(leaf.unsafe_buffer_pointer())
    assert len(set(pointers)) == len(pointers)
    assert state.step.dtype == jnp.int32 and int(state.step) == 0


def test_an_average_that_starts_as_the_weights_has_buffers_of_its_own(model):
    state, _ = tj.init(jax.random.key(0), model, tj.full(), tj.optim.with_average(optax.sgd(1.0)))
    for path, leaf in tj.paths(state.trainable).items():
        kept = tj.paths(state.opt_state.average)[path]
        assert kept.unsafe_buffer_pointer() != leaf.unsafe_buffer_pointer() and (kept == leaf).all()


def test_numpy_weights_become_jax_arrays():
    model = _model({"head": np.ones(2, np.float32), "stem": np.ones(2, np.float32)})
    state, frozen = tj.init(jax.random.key(0), model, tj.train("head"), optax.sgd(0.1))
    assert isinstance(state.trainable["head"], jax.Array) and isinstance(frozen["stem"], jax.Array)


def test_init_traces_under_eval_shape(model):
    shapes = jax.eval_shape(
        lambda key: tj.init(key, model, tj.lora("stem/kernel", 2), optax.adam(1e-3)), jax.random.key(0)
    )
    state, frozen = tj.init(jax.random.key(0), model, tj.lora("stem/kernel", 2), optax.adam(1e-3))
    assert jax.tree.structure(shapes) == jax.tree.structure((state, frozen))


@pytest.mark.parametrize("leaf, text", [(jnp.zeros(2, jnp.int32), "(2,) int32"), (3, "int")])
def test_a_leaf_that_gradients_cannot_train_raises(leaf, text):
    with pytest.raises(tj.SelectionError) as error:
        tj.init(jax.random.key(0), _model({"head": jnp.ones(2), "table": leaf}), tj.full(), optax.sgd(0.1))
    assert str(error.value) == (
        f"'table' is {text}, which gradients cannot train. Expected floating-point leaves: "
        "leave it out of the tuning's selector."
    )
    state, _ = tj.init(
        jax.random.key(0), _model({"head": jnp.ones(2), "table": leaf}), tj.train("head"), optax.sgd(0.1)
    )
    assert list(tj.paths(state.trainable)) == ["head"]


@pytest.mark.parametrize("array", [jnp.ones(2), np.ones(2, np.float32)])
def test_two_leaves_that_are_one_array_raise(array):
    with pytest.raises(tj.SelectionError) as error:
        tj.init(jax.random.key(0), _model({"decoder": array, "embedding": array}), tj.full(), optax.sgd(0.1))
    assert str(error.value) == (
        "'decoder' and 'embedding' are one array. Trained as two leaves they would drift apart: declare the tie with "
        "transferjax.interop.tie(model, {'embedding': 'decoder'}), or copy one of them."
    )


def test_groups_that_differ_between_tuning_and_optimizer_are_named(model):
    tuning = tj.chain(head=tj.train("head/**"), stem=tj.train("stem/**"))
    tx = tj.per_group(head=optax.sgd(0.1), lora=optax.sgd(0.1))
    with pytest.raises(tj.SelectionError) as error:
        tj.init(jax.random.key(0), model, tuning, tx)
    assert str(error.value) == (
        "per_group() and the tuning name different groups. Only in the tuning: ['stem']. Only in per_group: ['lora']. "
        "Write per_group(head=..., stem=...), or name the groups of the tuning so: tj.chain(head=..., lora=...)."
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"key": 0}, r"init\(\) expects a PRNG key first, got int: write jax\.random\.key\(0\)\."),
        ({"model": 3}, r"init\(\) expects a Model second, got int: write tj\.Model\(apply, capture, params, extra\)\."),
        ({"tuning": "fc/**"}, r"init\(\) expects a Tuning third, got str: write tj\.train\('fc/\*\*'\)\."),
        ({"tuning": None}, r"init\(\) expects a Tuning third, got NoneType: write tj\.train\('fc/\*\*'\)\."),
        ({"tx": None}, r"init\(\) expects an optax transform, got NoneType: write optax\.adamw\(1e-3\)\."),
    ],
)
def test_a_wrong_argument_says_what_to_write(change, message, model):
    arguments = {"key": jax.random.key(0), "model": model, "tuning": tj.full(), "tx": optax.sgd(0.1), **change}
    with pytest.raises(tj.TransferError, match=message):
        tj.init(**arguments)


def test_a_module_of_flax_is_to_be_wrapped_first():
    nnx = pytest.importorskip("flax.nnx")
    linen = pytest.importorskip("flax.linen")
    with pytest.raises(tj.TransferError, match=r"got Linear: write tj\.interop\.nnx\(module\)\."):
        tj.init(jax.random.key(0), nnx.Linear(2, 2, rngs=nnx.Rngs(0)), tj.full(), optax.sgd(0.1))
    with pytest.raises(tj.TransferError, match=r"got Dense: write tj\.interop\.linen\(module, variables\)\."):
        tj.init(jax.random.key(0), linen.Dense(2), tj.full(), optax.sgd(0.1))


def test_raw_key_data_is_wrapped(model, bits):
    raw, _ = tj.init(jax.random.PRNGKey(3), model, tj.full(), optax.sgd(0.1))
    typed, _ = tj.init(jax.random.key(3), model, tj.full(), optax.sgd(0.1))
    assert bits(raw) == bits(typed)
