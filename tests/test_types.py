"""How the shared nouns print."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import transferjax as tj
from transferjax._types import Preprocess

PARAMS = {"head": {"kernel": np.zeros((1300, 1000), np.float32)}, "scale": 1.0}


def test_a_model_prints_in_one_line():
    extra = {"mean": jnp.zeros(2), "var": jnp.zeros(2)}
    model = tj.Model(abs, None, PARAMS, extra, Preprocess((224, 224)))
    assert repr(model) == "Model(2 leaves, 1.3 M parameters, extra 2 leaves, size (224, 224))"
    shapes = jax.eval_shape(lambda: {"bias": jnp.zeros(1)})
    assert repr(tj.Model(None, None, shapes, {})) == "Model(1 leaf, 1 parameter, extra 0 leaves)"
    assert str(model._replace(params={"bias": np.zeros(10)}, preprocess=None)) == (
        "Model(1 leaf, 10 parameters, extra 2 leaves)"
    )


@pytest.mark.parametrize("size, text", [(999, "999"), (1500, "1.5 K"), (2 * 10**9, "2.0 G")])
def test_sizes_print_with_their_unit(size, text):
    params = {"bias": jax.ShapeDtypeStruct((size,), jnp.float32)}
    assert repr(tj.Model(None, None, params, {})) == f"Model(1 leaf, {text} parameters, extra 0 leaves)"


def test_a_state_prints_in_one_line():
    model = tj.Model(None, None, {"head": jnp.ones(3), "stem": jnp.ones(4)}, {"mean": jnp.zeros(2)})
    state, _ = tj.init(jax.random.key(0), model, tj.train("head"), optax.adam(0.1))
    rest = "trainable 1 leaf, 3 parameters, extra 1 leaf, optimizer 3 leaves)"
    assert repr(state) == f"FinetuneState(step 0, {rest}"
    assert repr(jax.eval_shape(lambda: state)) == f"FinetuneState({rest}"
    state.step.delete()
    assert repr(state) == f"FinetuneState({rest}"
