"""Operations: checked, inferred on shapes, run on numpy and on JAX arrays."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from transferjax._errors import PlanError
from transferjax.surgery import Move, Spec
from transferjax.surgery._ops import castable, check_op, dtype_name, infer, run, show, spec_of

F = "float32"


@pytest.mark.parametrize(
    ("op", "came", "made"),
    [
        (("permute", (2, 3, 1, 0)), Spec((32, 3, 5, 7), F), Spec((5, 7, 3, 32), F)),
        (("permute", (1, 2, 0)), Spec((2, 3, 4), F), Spec((3, 4, 2), F)),
        (("reshape", (2, -1)), Spec((4, 3), F), Spec((2, 6), F)),
        (("reshape", ()), Spec((1, 1), F), Spec((), F)),
        (("reshape", (0, 3)), Spec((0,), F), Spec((0, 3), F)),
        (("slice", 1, 2, 4), Spec((2, 5), F), Spec((2, 2), F)),
        (("slice", 0, 1, 1), Spec((2, 5), F), Spec((0, 5), F)),
        (("take", 1, 4), Spec((2, 5), F), Spec((2,), F)),
        (("take", 0, 1), Spec((2,), F), Spec((), F)),
        (("concat", 0), Spec((2, 5), F), Spec((2, 5), F)),
        (("stack", 2), Spec((2, 5), F), Spec((2, 5, 1), F)),
        (("cast", "bfloat16"), Spec((2,), F), Spec((2,), "bfloat16")),
        (("cast", F), Spec((2,), "int8"), Spec((2,), F)),
        (("resize_position_embedding", (2, 2), (3, 1), 1, "bicubic"), Spec((1, 5, 3), F), Spec((1, 4, 3), F)),
        (
            ("resize_position_embedding", (2, 3), (4, 4), 0, "bilinear"),
            Spec((6, 3), "bfloat16"),
            Spec((16, 3), "bfloat16"),
        ),
        (("resize_patch_embedding", (2, 6)), Spec((4, 4, 3, 2), F), Spec((2, 6, 3, 2), F)),
        (("adapt_input_channels", 1), Spec((3, 3, 3, 2), "float16"), Spec((3, 3, 1, 2), "float16")),
        (("resize_rows", 4, "mean", None, 1), Spec((2, 3), F), Spec((2, 4), F)),
        (("resize_rows", 2, "zeros", (2, -1), 0), Spec((3, 2), F), Spec((2, 2), F)),
    ],
)
def test_infer_says_what_run_makes(op, came, made):
    assert infer([op], [came]) == made
    array = np.arange(int(np.prod(came.shape))).reshape(came.shape).astype(jnp.dtype(came.dtype))
    assert check_op(json.loads(json.dumps(op))) == op
    for value in (array, jnp.asarray(array)):
        out = run([op], [value])
        assert isinstance(out, type(value))
        assert spec_of(out, "", "") == made


def test_permute_takes_axes_as_numpy_does():
    array = np.arange(24).reshape(2, 3, 4)
    assert np.array_equal(run([("permute", (1, 2, 0))], [array]), np.transpose(array, (1, 2, 0)))
    assert run([("permute", (1, 2, 0))], [array])[2, 3, 1] == array[1, 2, 3]


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (("permute", (0, 2)), r"axes (0, 2) are no permutation: expected each of 0 to 1 once"),
        (("permute", (1, 1)), r"axes (1, 1) are no permutation"),
        (("permute", "10"), r"axes '10' is malformed. Expected a tuple of integers."),
        (("permute", (True, 0)), r"axes (True, 0) is malformed"),
        (("reshape", (-1, -1)), r"shape (-1, -1) is malformed: expected sizes of at least 0, and at most one -1."),
        (("reshape", (2, -2)), r"shape (2, -2) is malformed"),
        (("cast", "float33"), r"'float33' is no dtype. Write a name such as 'float32'"),
        (("cast", None), r"None is no dtype"),
        (("cast",), r"operation 'cast' does not take 0 arguments"),
        (
            ("premute", (1, 0)),
            r"cast, slice, take, concat, stack, resize_position_embedding, resize_patch_embedding, "
            r"adapt_input_channels, resize_rows. Nearest: permute.",
        ),
        (("resize_position_embedding", (2,), (3, 3), 1, "bicubic"), r"old_grid (2,) is malformed"),
        (("resize_position_embedding", (2, 2), (3, 3), 1, ["bicubic"]), r"method list is unknown. Expected one of"),
        (("resize_position_embedding", (2, 2)), r"operation 'resize_position_embedding' does not take 1 arguments"),
        (("resize_patch_embedding", 7), r"size 7 is malformed"),
        (("adapt_input_channels", True), r"number of input channels True is malformed"),
        (("resize_rows", 2, "init", None, 0), r"fill 'init' is unknown. Expected one of 'mean', 'zeros'."),
        (("resize_rows", 2, "mean", {"0": 1}, 0), r"the mapping is malformed"),
        (("resize_rows", 2, "mean", (0, -2), 0), r"the mapping is malformed"),
        ("permute", r"operation 'permute' is malformed. Expected (name, argument)"),
        ((), r"operation () is malformed"),
    ],
)
def test_a_malformed_operation_raises(op, message):
    with pytest.raises(PlanError) as error:
        check_op(op)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("op", "came", "message"),
    [
        (("permute", (1, 0)), Spec((2,), F), "permute(1, 0) needs an array of 2 axes; (2,) float32 came."),
        (("reshape", (2, 2)), Spec((5,), F), "reshape(2, 2) does not hold the 5 elements of (5,) float32."),
        (("reshape", (2, -1)), Spec((5,), F), "reshape(2, -1) does not hold the 5 elements"),
        (("slice", 0, 2, 6), Spec((5,), F), "slice(0, 2, 6) (axis, start, stop) does not lie in (5,) float32."),
        (("slice", 1, 0, 1), Spec((5,), F), "slice(1, 0, 1) (axis, start, stop) does not lie in (5,) float32."),
        (("take", 0, 5), Spec((5,), F), "take(0, 5) (axis, index) does not lie in (5,) float32."),
        (("take", 1, 0), Spec((5,), F), "take(1, 0) (axis, index) does not lie in (5,) float32."),
        (
            ("resize_position_embedding", (2, 2), (3, 3), 1, "bicubic"),
            Spec((4, 3), F),
            "4 tokens came; the grid (2, 2)",
        ),
        (("resize_patch_embedding", (2, 2)), Spec((4, 4), F), "the kernel of a patch embedding is [h, w, in, out]"),
        (("adapt_input_channels", 2), Spec((3, 3, 4, 2), F), "a kernel of 4 input channels is not made into one of 2"),
        (("resize_rows", 2, "mean", None, 0), Spec((3, 2), F), "3 rows do not fit into 2."),
        (
            ("resize_rows", 4, "mean", None, 0),
            Spec((3, 2), "int8"),
            "resize_rows needs floats; (3, 2) int8 came. Write",
        ),
        (("resize_rows", 4, "mean", None, 0), Spec((3, 2), "complex64"), "resize_rows needs floats; (3, 2) complex64"),
        (("cast", "int32"), Spec((5,), F), "cast to int32 would not keep the numbers of (5,) float32."),
    ],
)
def test_an_operation_that_does_not_fit_raises(op, came, message):
    with pytest.raises(PlanError) as error:
        infer([op], [came])
    assert message in str(error.value)


def test_several_arrays_at_the_end_raise():
    with pytest.raises(PlanError, match="2 arrays are left after the operations; expected one"):
        infer([], [Spec((2,), F), Spec((2,), F)])


@pytest.mark.parametrize(
    ("source", "target", "allowed"),
    [
        ("float32", "bfloat16", True),
        ("float16", "float64", True),
        ("int64", "int32", True),
        ("int64", "float32", True),
        ("bool", "int8", True),
        ("float32", "complex64", True),
        ("float32", "float8_e4m3fn", True),
        ("float32", "int32", False),
        ("complex64", "float32", False),
        ("int8", "bool", False),
        ("key<fry>", "float32", False),
    ],
)
def test_a_cast_keeps_numbers_or_is_refused(source, target, allowed):
    assert castable(source, target) is allowed


@pytest.mark.parametrize("array_of", [np.asarray, jnp.asarray])
def test_a_cast_that_loses_values_raises(array_of):
    with pytest.raises(PlanError) as error:
        run([("cast", "int8")], [array_of(np.array([1, 300], np.int32))])
    assert "cast from int32 to int8 changes 1 of 2 values" in str(error.value)
    with pytest.raises(PlanError) as error:
        run([("cast", "float16")], [array_of(np.array([1.0, 1e6, np.inf], np.float32))])
    assert "cast from float32 to float16 makes 1 of 3 values infinite" in str(error.value)
    assert "'bfloat16'" in str(error.value)


def test_an_integer_that_a_float_cannot_hold_raises():
    with pytest.raises(PlanError, match="changes 1 of 1 values"):
        run([("cast", "float32")], [np.array([2**24 + 1], np.int64)])


def test_casts_of_every_width_keep_what_they_can_hold():
    assert run([("cast", "float64")], [np.array([1e30], np.float32)])[0] == np.float32(1e30)
    assert np.isnan(run([("cast", "float16")], [np.array([np.nan], np.float64)])).all()
    assert run([("cast", "bfloat16")], [np.ones(2, np.float64)]).dtype == ml_dtypes.bfloat16
    assert run([("cast", "float32")], [np.zeros((0, 2), np.int64)]).shape == (0, 2)
    same = np.ones(2, np.float32)
    assert run([("cast", "float32")], [same]) is same


def test_operations_trace():
    out = jax.jit(lambda x: run([("permute", (1, 0)), ("cast", "bfloat16")], [x]))(jnp.ones((2, 3)))
    assert out.shape == (3, 2) and out.dtype == jnp.bfloat16


def test_a_move_names_its_leaf_when_its_cast_fails():
    move = Move("head/bias", "fc.bias", (("cast", "int8"),))
    with pytest.raises(PlanError, match=r"'head/bias' from 'fc.bias': cast from int64 to int8 changes 1 of 1 values"):
        move.run([np.array([1000])])


def test_a_move_with_another_number_of_arrays_raises():
    with pytest.raises(PlanError, match="'a' is made from 1 arrays; 2 came"):
        Move("a", "b").run([np.zeros(1), np.zeros(1)])


def test_names_of_dtypes_and_words_of_operations():
    assert dtype_name(jnp.bfloat16) == "bfloat16"
    assert dtype_name(np.float32) == dtype_name("float32") == "float32"
    assert show(("reshape", (3, 3, 1, 8))) == "reshape(3, 3, 1, 8)"
    assert show(("cast", "float16")) == "cast(float16)"
    assert show(("resize_patch_embedding", (8, 8))) == "resize_patch_embedding(8, 8)"
    assert show(("resize_position_embedding", (7, 7), (9, 9), 1, "bicubic")) == (
        "resize_position_embedding((7, 7), (9, 9), 1, bicubic)"
    )
    rows = tuple(range(1000, 3000))
    assert show(("resize_rows", 2000, "mean", rows, 0)) == (
        "resize_rows(2000, mean, (1000, 1001, 1002, 1003, 1004, 1005, ... 2,000 in all), 0)"
    )


def test_a_leaf_without_shape_raises():
    with pytest.raises(PlanError, match="target leaf 'step' is int; expected something with shape and dtype"):
        spec_of(3, "step", "target")
