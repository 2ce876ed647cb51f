import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transferjax import interop
from transferjax._errors import SelectionError, TransferError
from transferjax.tree import paths


def moved(model, key=None, train=False, inputs=None):
    x = jax.random.normal(jax.random.key(9), (8, 2)) + 1 if inputs is None else inputs
    extra = model.apply(model.params, model.extra, x, key=key, train=train)[1]
    old = paths(model.extra)
    return {path for path, leaf in paths(extra).items() if not np.array_equal(leaf, old[path])}


class Norms(nnx.Module):
    """BatchNorms told in every way there is what to do."""

    def __init__(self, rngs):
        self.off = nnx.BatchNorm(2, use_running_average=True, rngs=rngs)
        self.on = nnx.BatchNorm(2, use_running_average=False, rngs=rngs)
        self.unset = nnx.BatchNorm(2, use_running_average=None, rngs=rngs)
        self.bare = nnx.BatchNorm(2, use_scale=False, use_bias=False, rngs=rngs)
        self.blocks = nnx.List([nnx.Sequential(nnx.Linear(2, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs))])

    def __call__(self, x):
        x = self.unset(3 * self.on(3 * self.off(x) + 1) + 1, use_running_average=False)
        x = self.bare(3 * x + 1, True)
        return self.blocks[0](x)


EVERY = ("off", "on", "unset", "bare", "blocks/0/layers/1")


@pytest.mark.parametrize("chosen", EVERY)
def test_each_batch_norm_moves_alone(chosen):
    model = interop.nnx(Norms(nnx.Rngs(0)))
    assert moved(model, train=chosen) == {f"{chosen}/mean", f"{chosen}/var"}


def test_all_and_none():
    model = interop.nnx(Norms(nnx.Rngs(0)))
    assert moved(model, train=True) == {f"{path}/{leaf}" for path in EVERY for leaf in ("mean", "var")}
    assert moved(model) == set()


def test_group_and_layer_norm_do_not_care():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.GroupNorm(4, num_groups=2, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)

        def __call__(self, x):
            return self.b(self.a(x))

    model = interop.nnx(Net(nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (3, 4))
    on, off = (model.apply(model.params, model.extra, x, train=train)[0] for train in (True, False))
    assert np.array_equal(on, off)
    assert model.extra == {}


class DropConnect(nnx.Module):
    def __init__(self, rngs):
        self.drop = nnx.Dropout(0.5, broadcast_dims=(1, 2), deterministic=True, rngs=rngs)

    def __call__(self, x, deterministic=True):
        return self.drop(x, deterministic=deterministic)


def test_drop_connect_drops_whole_examples_where_selected():
    model = interop.nnx(DropConnect(nnx.Rngs(0)))
    x = jnp.ones((64, 2, 2))
    kept, _ = model.apply(model.params, model.extra, x, key=jax.random.key(3), train="drop")
    assert {tuple(np.unique(example)) for example in np.asarray(kept)} == {(0.0,), (2.0,)}
    assert np.array_equal(model.apply(model.params, model.extra, x, key=jax.random.key(3))[0], x)


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(1, 4, dropout_rate=0.5, decode=False, rngs=rngs)

    def __call__(self, x):
        return self.attention(x, deterministic=False)


def test_dropout_inside_attention():
    model = interop.nnx(Attention(nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))

    def differs(train):
        keys = (jax.random.key(1), jax.random.key(2))
        one, two = (model.apply(model.params, model.extra, x, key=key, train=train)[0] for key in keys)
        return not np.array_equal(one, two)

    assert not differs(False)
    assert differs(True)
    assert differs("attention")


def test_a_stream_without_a_key_says_what_to_pass():
    model = interop.nnx(DropConnect(nnx.Rngs(0)))
    with pytest.raises(TransferError, match=r"random stream 'default' in training mode, but key is None. Pass key="):
        model.apply(model.params, model.extra, jnp.ones((2, 2, 2)), train=True)


def test_old_style_keys_and_stacked_streams_are_seeded():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.streams = rngs.dropout.split(3)

        def __call__(self, x):
            return jax.vmap(lambda k: jax.random.normal(k))(self.streams.key[...])

    model = interop.nnx(Net(nnx.Rngs(0)))
    drawn = model.apply({}, {}, None, key=jax.random.PRNGKey(0))[0]
    assert len(set(np.asarray(drawn).tolist())) == 3


def test_two_streams_draw_different_numbers_and_the_place_of_one_does_not_change_the_other():
    class Net(nnx.Module):
        def __init__(self, rngs, more):
            self.a = nnx.Dropout(0.5, rngs=rngs)
            if more:
                self.aa = nnx.Dropout(0.5, rngs=rngs)
            self.b = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.a(x), self.b(x)

    outputs = []
    for more in (False, True):
        model = interop.nnx(Net(nnx.Rngs(0), more))
        outputs.append(model.apply({}, {}, jnp.ones(64), key=jax.random.key(0), train=True)[0])
    assert not np.array_equal(*outputs[0])
    assert all(np.array_equal(one, two) for one, two in zip(*outputs, strict=True))


def test_the_module_is_neither_changed_nor_listened_to():
    module = Norms(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)))
    model = interop.nnx(module)
    x = jax.random.normal(jax.random.key(0), (8, 2))
    out, _ = model.apply(model.params, model.extra, x, train=True)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)))
    assert type(module.on) is nnx.BatchNorm
    assert model.params["on"]["scale"] is module.on.scale.get_value()
    module.on.scale.set_value(jnp.zeros(2))
    module.on = nnx.BatchNorm(2, momentum=0.0, rngs=nnx.Rngs(1))
    assert np.array_equal(out, model.apply(model.params, model.extra, x, train=True)[0])


def test_numpy_leaves_are_copied():
    module = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    array = np.ones((2, 2), np.float32)
    module.kernel.set_value(array)
    model = interop.nnx(module)
    array[:] = 5
    assert float(model.params["kernel"].max()) == 1.0


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(2, 2, use_bias=False, rngs=rngs)
        self.b = nnx.Linear(2, 2, use_bias=False, rngs=rngs)
        self.b.kernel = self.a.kernel
        self.c = self.a

    def __call__(self, x):
        return self.c(self.b(self.a(x)))


def test_shared_variables_come_once_and_stay_shared():
    model = interop.nnx(Tied(nnx.Rngs(0)))
    assert list(paths(model.params)) == ["a/kernel"]
    outputs, _ = model.apply({"a": {"kernel": 2 * jnp.eye(2)}}, {}, jnp.ones((1, 2)))
    assert outputs.tolist() == [[8.0, 8.0]]


def test_a_module_called_twice_is_captured_twice():
    model = interop.nnx(Tied(nnx.Rngs(0)))
    outputs, _, found = model.capture(model.params, {}, jnp.ones((1, 2)), "*")
    assert set(found) == {"a", "a#2", "b"}
    assert np.array_equal(found["a#2"], outputs)


def test_a_module_that_is_never_called_gives_nothing_and_says_so():
    module = Tied(nnx.Rngs(0))
    module.unused = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    model = interop.nnx(module)
    assert set(model.capture(model.params, {}, jnp.ones((1, 2)), "{b,unused}")[2]) == {"b"}
    with pytest.raises(SelectionError, match=r"capture\(\): selector 'unused' matched unused, which the forward pass"):
        model.capture(model.params, {}, jnp.ones((1, 2)), "unused")
    changed = interop.insert(model, "unused", lambda aux, output: output)
    with pytest.raises(SelectionError, match=r"insert\(\): selector 'unused' matched unused, which the forward pass"):
        changed.apply(model.params, {}, jnp.ones((1, 2)))


class Parts(nnx.Module):
    def __init__(self, rngs):
        self.pair = Pair(rngs)

    def __call__(self, x):
        a, b = self.pair(x)
        return a + b["sum"]


class Pair(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(2, 2, rngs=rngs)

    def __call__(self, x):
        return self.linear(x), {"sum": x.sum()}


def test_outputs_in_containers_are_captured_by_part():
    model = interop.nnx(Parts(nnx.Rngs(0)))
    found = model.capture(model.params, {}, jnp.ones((1, 2)), "pair")[2]
    assert {name: value.shape for name, value in found.items()} == {"pair/0": (1, 2), "pair/1/sum": ()}


def test_capture_agrees_with_flax():
    module = Tied(nnx.Rngs(0))
    model = interop.nnx(module)
    x = jnp.ones((1, 2))
    found = model.capture(model.params, {}, x, "*")[2]
    _, expected = nnx.capture(module, nnx.Intermediate, method_outputs=nnx.Intermediate)(x)
    first, second = expected["a"]["__call__"].get_value()
    assert np.array_equal(found["a"], first)
    assert np.array_equal(found["a#2"], second)
    assert np.array_equal(found["b"], expected["b"]["__call__"].get_value()[0])


class Rematerialised(nnx.Module):
    def __init__(self, rngs):
        self.bn = nnx.BatchNorm(2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    @nnx.remat
    def __call__(self, x):
        return self.dropout(self.bn(x))


class Outer(nnx.Module):
    def __init__(self, rngs):
        self.inner = Rematerialised(rngs)

    def __call__(self, x):
        return self.inner(x)


def test_modes_captures_and_insertions_inside_remat():
    model = interop.nnx(Outer(nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (8, 2))
    assert moved(model, train="inner/bn") == {"inner/bn/mean", "inner/bn/var"}
    assert moved(model) == set()
    assert moved(model, key=jax.random.key(0), train="inner/dropout") == set()

    def features(params, model=model):
        return model.capture(params, model.extra, x, "inner/bn")[2]["inner/bn"].sum()

    assert float(jax.jit(jax.grad(features))(model.params)["inner"]["bn"]["bias"][0]) == 8.0
    for factor in (2.0, 3.0):
        changed = interop.insert(model, "inner/bn", lambda aux, out, by=factor: by * out)
        assert float(jax.jit(jax.grad(lambda p, m=changed: m.apply(p, m.extra, x)[0].sum()))(model.params)
                     ["inner"]["bn"]["bias"][0]) == 8.0 * factor  # fmt: skip


class Stacked(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.vmap(Rematerialised)(rngs.fork(split=3))

    def __call__(self, x):
        return nnx.scan(lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_modes_captures_and_insertions_inside_scan():
    model = interop.nnx(Stacked(nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (8, 2)) + 1
    assert model.params["layers"]["bn"]["scale"].shape == (3, 2)
    assert moved(model, train="layers/bn") == {"layers/bn/mean", "layers/bn/var"}
    assert moved(model) == set()
    found = model.capture(model.params, model.extra, x, "layers/bn")[2]
    assert found["layers/bn"].shape == (3, 8, 2)
    zero = interop.insert(model, "layers/bn", lambda aux, output: output * 0)
    assert not zero.apply(zero.params, zero.extra, x)[0].any()


class Counting(nnx.Module):
    """Own statistics, moved whatever the mode; a cache; a buffer; a Param subclass; a nested value."""

    def __init__(self):
        self.count = nnx.BatchStat(0)
        self.cache = nnx.Cache(jnp.zeros(2))
        self.buffer = nnx.data(jnp.arange(2.0))
        self.lora = nnx.LoRAParam(jnp.ones(2))
        self.nested = nnx.Param({"a": jnp.ones(2), "b": (jnp.ones(1),)})
        self.name = nnx.Variable("static")

    def __call__(self, x):
        assert self.name.get_value() == "static"
        self.count.set_value(self.count.get_value() + 1)
        self.cache[...] = x
        return x * self.lora[...] + self.buffer + self.nested.get_value()["b"][0]


def test_every_kind_of_variable():
    model = interop.nnx(Counting())
    assert set(paths(model.params)) == {"lora", "nested/a", "nested/b/0"}
    assert set(paths(model.extra)) == {"count", "cache", "buffer"}
    x = jnp.ones(2)
    assert moved(model, inputs=x) == {"cache"}
    assert moved(model, inputs=x, train=True) == {"cache", "count"}


def test_extra_that_changes_its_structure_raises():
    class Growing(nnx.Module):
        def __init__(self):
            self.seen = nnx.BatchStat((jnp.zeros(2),))

        def __call__(self, x):
            self.seen.set_value((*self.seen.get_value(), x))
            return x

    model = interop.nnx(Growing())
    with pytest.raises(TransferError, match="'seen' changed its structure during the forward pass"):
        model.apply({}, model.extra, jnp.ones(2), train=True)


def test_abstract_modules():
    model = interop.nnx(nnx.eval_shape(lambda: Norms(nnx.Rngs(0))))
    assert isinstance(model.params["on"]["scale"], jax.ShapeDtypeStruct)
    outputs, _ = jax.eval_shape(model.apply, model.params, model.extra, jax.ShapeDtypeStruct((8, 2), jnp.float32))
    assert outputs.shape == (8, 2)


class Flagged(nnx.Module):
    def __init__(self, rngs):
        self.bn = nnx.BatchNorm(2, rngs=rngs)

    def __call__(self, x, training):
        return self.bn(x, use_running_average=not training) * (2 if training else 1)


def test_a_training_argument_of_ones_own():
    model = interop.nnx(Flagged(nnx.Rngs(0)), train_argument="training")
    x = jax.random.normal(jax.random.key(0), (8, 2))
    assert moved(model, train=True) == {"bn/mean", "bn/var"}
    assert moved(model) == set()
    on, _ = model.apply(model.params, model.extra, x, train="bn")  # the root itself is in inference mode
    both, _ = model.apply(model.params, model.extra, x, train=True)
    np.testing.assert_allclose(both, 2 * on, rtol=1e-6)


def test_a_flag_that_is_a_class_attribute_or_a_property():
    class Net(nnx.Module):
        deterministic = True

        @property
        def use_running_average(self):
            return None

        def __call__(self, x):
            return self.deterministic

    model = interop.nnx(Net())
    assert model.apply({}, {}, 0.0, train=True)[0] is False
    assert model.apply({}, {}, 0.0)[0] is True


def test_spectral_norm_follows_its_module():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.spectral = nnx.SpectralNorm(nnx.Linear(2, 2, rngs=rngs), rngs=rngs)

        def __call__(self, x):
            return self.spectral(x, update_stats=True)

    model = interop.nnx(Net(nnx.Rngs(0)))
    assert moved(model) == set()
    assert moved(model, train="spectral")


def test_what_was_sown_before_is_left_out():
    module = Outer(nnx.Rngs(0))
    module.left = nnx.Intermediate(jnp.ones(3))
    model = interop.nnx(module)
    assert set(paths(model.extra)) == {"inner/bn/mean", "inner/bn/var"}
    assert hasattr(module, "left")


@pytest.mark.parametrize(
    ("value", "message"),
    [(3, r"nnx\(\) expects a flax.nnx.Module, got int\.$"), ("linen", r"For Flax Linen write tj.interop.linen")],
)
def test_other_modules_raise(value, message):
    import flax.linen as nn

    with pytest.raises(TransferError, match=message):
        interop.nnx(nn.Dense(2) if value == "linen" else value)
