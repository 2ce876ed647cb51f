import flax.linen as nn
import jax
import jax.numpy as jnp

from transferjax import interop


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(2, name="body")(x)
        return nn.Dropout(0.5, name="dropout")(x, deterministic=True)


def test_without_inputs_linen_shows_modules_with_weights_with_inputs_all():
    model = interop.linen(Net(), Net().init(jax.random.key(0), jnp.ones((1, 2))))
    own = ("body/bias", "body/kernel")
    assert interop.module_paths(model) == {"": (), "body": own}
    assert interop.module_paths(model, jnp.ones((1, 2))) == {"": (), "body": own, "dropout": ()}


def test_leaves_of_the_root_and_natural_order():
    model = interop.pure(lambda p, x: x, {"scale": 1.0, "blocks": {"10": {"w": 1.0}, "2": {"w": 1.0}}})
    assert interop.module_paths(model) == {
        "": ("scale",), "blocks": (), "blocks/2": ("blocks/2/w",), "blocks/10": ("blocks/10/w",)
    }  # fmt: skip
