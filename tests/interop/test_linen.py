import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import core

from transferjax import interop
from transferjax._errors import SelectionError, TransferError
from transferjax.tree import paths

X = np.random.default_rng(0).normal(1, 2, (8, 2)).astype(np.float32)


def model_of(module, *args, x=X, **options):
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    return interop.linen(module, module.init(keys, x, *args), **options)


def moved(model, key=None, train=False, x=X):
    extra = model.apply(model.params, model.extra, x, key=key, train=train)[1]
    old = paths(model.extra)
    return {path for path, leaf in paths(extra).items() if not np.array_equal(leaf, old[path])}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=False, name="at_construction")(nn.Dense(2)(x))
        x = nn.BatchNorm(name="at_call")(3 * x + 1, use_running_average=False)
        x = nn.BatchNorm(name="positional")(3 * x + 1, True)
        x = nn.BatchNorm(use_running_average=True, use_scale=False, use_bias=False, name="off")(3 * x + 1)
        return nn.Dropout(0.5, deterministic=False)(x)


class Net(nn.Module):
    block: type = Block

    @nn.compact
    def __call__(self, x, train):
        for number in range(2):
            x = self.block(name=f"blocks_{number}")(x, train)
        return nn.GroupNorm(1)(x)


NORMS = ("at_construction", "at_call", "positional", "off")


@pytest.mark.parametrize("chosen", NORMS)
@pytest.mark.parametrize("block", [Block, nn.remat(Block, static_argnums=2)])
def test_each_batch_norm_moves_alone(chosen, block):
    model = model_of(Net(block), True)
    assert moved(model, train=f"blocks_1/{chosen}") == {f"blocks_1/{chosen}/{leaf}" for leaf in ("mean", "var")}
    assert moved(model) == set()


def test_train_true_moves_all():
    model = model_of(Net(), True)
    expected = {f"blocks_{n}/{norm}/{leaf}" for n in (0, 1) for norm in NORMS for leaf in ("mean", "var")}
    assert moved(model, jax.random.key(0), True) == expected == set(paths(model.extra))


def test_a_stream_without_a_key_says_what_to_pass():
    model = model_of(Net(), True)
    with pytest.raises(TransferError, match=r"random stream 'dropout' in training mode, but key is None. Pass key="):
        model.apply(model.params, model.extra, X, train=True)


def test_any_stream_name_is_seeded_and_other_key_errors_pass_through():
    class Noise(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + jax.random.normal(self.make_rng("noise"), x.shape)

    model = interop.linen(Noise(), {"params": {}})
    a, b = (model.apply({}, {}, X, key=jax.random.key(k))[0] for k in (0, 1))
    assert not np.array_equal(a, b)


def test_capture_agrees_with_flax_and_crosses_remat():
    module = Net(nn.remat(Block, static_argnums=2))
    variables = module.init({"params": jax.random.key(0), "dropout": jax.random.key(0)}, X, True)
    model = interop.linen(module, variables)
    _, _, found = model.capture(model.params, model.extra, X, "blocks_0/{at_construction,Dense_0}")
    assert set(found) == {"blocks_0/at_construction", "blocks_0/Dense_0"}
    expected = nn.Dense(2).apply({"params": variables["params"]["blocks_0"]["Dense_0"]}, X)
    np.testing.assert_allclose(found["blocks_0/Dense_0"], expected, rtol=1e-6)

    def loss(params):
        return model.capture(params, model.extra, X, "blocks_0/at_call")[2]["blocks_0/at_call"].sum()

    assert float(jax.jit(jax.grad(loss))(model.params)["blocks_0"]["at_call"]["bias"][0]) == 8.0


def test_capture_agrees_with_capture_intermediates():
    class Two(nn.Module):
        def setup(self):
            self.shared = nn.Dense(2)

        def __call__(self, x):
            return self.shared(nn.relu(self.shared(x)))

    module = Two()
    variables = module.init(jax.random.key(0), X)
    model = interop.linen(module, variables)
    found = model.capture(model.params, {}, X, "shared")[2]
    _, state = module.apply(variables, X, capture_intermediates=True, mutable=["intermediates"])
    first, second = state["intermediates"]["shared"]["__call__"]
    assert np.array_equal(found["shared"], first)
    assert np.array_equal(found["shared#2"], second)


class Sub(nn.Dense):
    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(x)


def test_a_call_of_the_parent_class_is_no_second_call():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Sub(2, name="sub")(x)

    model = model_of(Outer())
    outputs, _, found = model.capture(model.params, {}, X, "sub")
    assert set(found) == {"sub"}
    assert np.array_equal(found["sub"], outputs)
    changed = interop.insert(model, "sub", lambda aux, out: -out)
    assert np.array_equal(changed.apply(model.params, {}, X)[0], -outputs)


class Scanned(nn.Module):
    carried: bool

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, **({"intermediates": 0} if self.carried else {})}
        layer = nn.scan(Step, variable_axes=axes, split_rngs={"params": True}, length=3)
        return layer(name="layers")(x, None)[0]


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(2, name="dense")(x), None


def test_capture_inside_a_scan():
    model = model_of(Scanned(True))
    found = model.capture(model.params, {}, X, "layers/dense")[2]
    assert found["layers/dense"].shape == (3, 8, 2)
    model = model_of(Scanned(False))
    with pytest.raises(TransferError, match=r"'layers/dense' cannot leave the transformation.*variable_axes="):
        model.capture(model.params, {}, X, "layers/dense")


class Modes(nn.Module):
    """Own modules with flags: a field, an argument, both, and an argument without default."""

    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x, deterministic: bool | None = None):
        return x, nn.merge_param("deterministic", self.deterministic, deterministic)


class Required(nn.Module):
    deterministic: bool | None = True

    @nn.compact
    def __call__(self, x, deterministic: bool):
        return x, nn.merge_param("deterministic", self.deterministic, deterministic)


class Defaulted(nn.Module):
    deterministic: bool = False

    @nn.compact
    def __call__(self, x, deterministic: bool = True):
        return x, self.deterministic and deterministic


@pytest.mark.parametrize("module", [Modes(), Modes(True), Modes(False), Required(), Defaulted()])
def test_fields_and_arguments_of_any_module(module):
    model = interop.linen(module, {"params": {}})
    assert model.apply({}, {}, X)[0][1] is True
    assert model.apply({}, {}, X, train=True)[0][1] is False
    assert model.apply({}, {}, {"x": X, "deterministic": False})[0][1] is True
    assert module.deterministic in (None, True, False)


@pytest.mark.parametrize(
    ("argument", "train", "expected"),
    [("train", False, False), ("train", True, True), ("deterministic", False, True), ("deterministic", True, False)],
)
def test_the_training_argument_of_the_root(argument, train, expected):
    class Root(nn.Module):
        @nn.compact
        def __call__(self, x, train="none", deterministic="none"):
            return {"train": train, "deterministic": deterministic}[argument]

    assert interop.linen(Root(), {"params": {}}, train_argument=argument).apply({}, {}, X, train=train)[0] is expected
    assert interop.linen(Root(), {"params": {}}, train_argument=None).apply({}, {}, {"x": X})[0] is not None


class Collections(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.ones, (2,))
        for collection, name in (("cache", "index"), ("stats", "kernel"), ("other", "index")):
            variable = self.variable(collection, name, jnp.zeros, ())
            variable.value = variable.value + 1
        self.sow("intermediates", "seen", x)
        return x * kernel


def test_collections_share_one_tree_and_collisions_get_a_prefix():
    model = interop.linen(Collections(), Collections().init(jax.random.key(0), X))
    assert set(paths(model.params)) == {"kernel"}
    assert set(paths(model.extra)) == {"index", "other/index", "stats/kernel"}
    assert moved(model) == {"index"}  # the cache
    assert moved(model, train=True) == {"index", "other/index", "stats/kernel"}


def test_a_collision_that_stays_raises():
    variables = {"params": {"a": {"b": X}}, "x": {"a": X}, "y": {"a": X, "b": X}}
    model = interop.linen(nn.Dense(2), variables)
    assert set(paths(model.extra)) == {"x/a", "y/a", "y/b"}
    with pytest.raises(SelectionError, match="the collection 'x' has paths of other variables: x/a"):
        interop.linen(nn.Dense(2), {"params": {"a": X, "x": {"a": X}}, "x": {"a": X}})


def test_frozen_dicts_boxes_and_abstract_variables():
    module = nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.ones, ("in", "out")))
    variables = core.freeze(module.init(jax.random.key(0), X))
    model = interop.linen(module, variables)
    assert type(model.params) is dict
    assert model.apply(model.params, {}, X)[0].shape == (8, 3)
    shapes = interop.linen(module, jax.eval_shape(module.init, jax.random.key(0), X))
    assert isinstance(shapes.params["kernel"], jax.ShapeDtypeStruct)
    assert jax.eval_shape(shapes.apply, shapes.params, {}, X)[0].shape == (8, 3)


def test_spectral_norm_keeps_the_keys_with_slashes():
    class Spectral(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.SpectralNorm(nn.Dense(2), name="norm")(x, update_stats=True)

    model = model_of(Spectral())
    assert moved(model) == set()
    assert moved(model, train=True) == set(paths(model.extra))


@pytest.mark.parametrize(
    ("module", "variables", "message"),
    [
        (3, {"params": {}}, r"linen\(\) expects a flax.linen.Module, got int"),
        (nn.Dense(2), {"kernel": X}, r"write \{'params': params\}"),
        (nn.Dense(2), None, r"expects the variables that module.init returns"),
    ],
)
def test_bad_arguments(module, variables, message):
    with pytest.raises(TransferError, match=message):
        interop.linen(module, variables)
