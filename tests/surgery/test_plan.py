"""Plan as a value: printed, counted, bound to a source, applied."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transferjax._errors import PlanError
from transferjax.surgery import Move, Plan, Spec, cast, fresh, plan, rename, torch_layout, waive

S = jax.ShapeDtypeStruct
SOURCE = {
    "fc.weight": S((3, 2), np.float32),
    "fc.bias": S((3,), np.float16),
    "fc.steps": S((), np.int64),
}
TARGET = {"fc": {"kernel": S((2, 3), np.float32), "bias": S((3,), np.float32)}, "new": S((4,), np.float32)}
RULES = (
    rename(r"fc\.weight", "fc/kernel"),
    rename(r"fc\.bias", "fc/bias"),
    torch_layout(),
    cast("fc/bias", "float32"),
    waive("*.steps"),
    fresh("new"),
)
ARRAYS = {
    "fc.weight": np.arange(6, dtype=np.float32).reshape(3, 2),
    "fc.bias": np.array([1, 2, 3], np.float16),
}


@pytest.fixture
def made():
    return plan(SOURCE, TARGET, *RULES)


def test_one_move_per_target_leaf(made):
    assert made.moves == (
        Move("fc/bias", "fc.bias", (("cast", "float32"),)),
        Move("fc/kernel", "fc.weight", (("permute", (1, 0)),)),
        Move("new", None),
    )
    assert made.waived == ("fc.steps",)
    assert made.shapes["fc/kernel"] == Spec((2, 3), "float32") == ((2, 3), "float32")
    assert made.sources["fc.bias"] == ((3,), "float16")


def test_the_table(made):
    assert str(made.with_source("sha256:0f")) == (
        "Plan: 3 sources -> 3 targets\n"
        "target     shape   dtype    source     came    how\n"
        "---------  ------  -------  ---------  ------  -------------\n"
        "fc/bias    (3,)    float32  fc.bias    (3,)    cast(float32)\n"
        "fc/kernel  (2, 3)  float32  fc.weight  (3, 2)  permute(1, 0)\n"
        "new        (4,)    float32                     fresh\n"
        "                            fc.steps   ()      waived\n"
        "copied: 0\n"
        "transformed: 2\n"
        "fresh: 1\n"
        "waived: 1\n"
        "parameters read: 9\n"
        "source: sha256:0f"
    )
    assert repr(made) == "Plan(3 sources -> 3 targets: 0 copied, 2 transformed, 1 fresh, 1 waived)"


def test_a_plan_is_a_value(made):
    again = plan(SOURCE, TARGET, *RULES)
    assert made == again and hash(made) == hash(again)
    assert made.with_source("a") != made
    assert made.with_source("a").with_source(None) == made


@pytest.mark.parametrize("array_of", [np.asarray, jnp.asarray])
def test_apply_reads_what_the_plan_names_and_nothing_else(made, array_of):
    asked = []

    def read(name):
        asked.append(name)
        return array_of(ARRAYS[name])

    out = made.apply(read, {"new": array_of(np.ones(4, np.float32))})
    assert asked == ["fc.bias", "fc.weight"]
    assert list(out) == ["fc/bias", "fc/kernel", "new"]
    assert np.array_equal(out["fc/kernel"], ARRAYS["fc.weight"].T)
    assert out["fc/bias"].dtype == np.float32 and out["fc/bias"].tolist() == [1.0, 2.0, 3.0]


def test_leaves_streams(made):
    asked = []
    stream = made.leaves(lambda name: asked.append(name) or ARRAYS[name], {"new": np.ones(4, np.float32)})
    assert isinstance(stream, types.GeneratorType)
    assert next(stream)[0] == "fc/bias" and asked == ["fc.bias"]


@pytest.mark.parametrize(
    ("arrays", "initial", "message"),
    [
        ({"fc.bias": np.zeros(4, np.float16)}, None,
         "source 'fc.bias' is (4,) float16; the plan was made for (3,) float16."),
        ({"fc.bias": np.zeros(3, np.float32)}, None,
         "source 'fc.bias' is (3,) float32; the plan was made for (3,) float16."),
        ({"fc.bias": [1.0, 2.0, 3.0]}, None, "source 'fc.bias' is (3,) float32; the plan was made for"),
        ({}, None, "there is no source 'fc.bias'; the plan was made with one of (3,) float16."),
        (ARRAYS, None, "'new' is fresh, but there is no init. Write plan.apply(read, init)."),
        (ARRAYS, {}, "there is no initial value of 'new'; the plan was made with one of (4,) float32."),
        (ARRAYS, {"new": np.zeros(5, np.float32)},
         "initial value of 'new' is (5,) float32; the plan was made for (4,)"),
        (ARRAYS, {"new": S((4,), np.float32)}, "'new' is fresh, but its initial value is a jax.ShapeDtypeStruct."),
    ],
)  # fmt: skip
def test_apply_to_other_arrays_raises(made, arrays, initial, message):
    with pytest.raises(PlanError) as error:
        made.apply(arrays, initial)
    assert message in str(error.value)


def test_a_move_that_breaks_the_promise_of_its_plan_raises():
    one = Plan((Move("a", "b"),), (), {"a": Spec((2,), "float64")}, {"b": Spec((2,), "float32")})
    with pytest.raises(PlanError, match=r"'a' came out as \(2,\) float32; the plan promises \(2,\) float64"):
        one.apply({"b": np.zeros(2, np.float32)})
