"""Which modules train when only some parameters learn, and weights beside the model's own."""

import jax
import pytest

import transferjax as tj
from transferjax.tree import auxiliary, training_selector
from transferjax.tree._modules import is_extended

PARAMS = [
    "stem/conv/kernel",
    "stem/bn/scale",
    "stem/bn/bias",
    "blocks/0/dense/kernel",
    "head/fc/kernel",
    "head/fc/bias",
]
MODULES = [
    "",
    "stem",
    "stem/conv",
    "stem/bn",
    "stem/drop",
    "blocks/0",
    "blocks/0/drop",
    "head",
    "head/fc",
    "head/drop",
    "drop",
]

TABLE = [
    (["head/fc/kernel"], ["", "head", "head/fc", "head/drop", "drop"]),
    (["stem/bn/bias"], ["", "stem", "stem/bn", "stem/drop", "drop"]),
    (["blocks/0/dense/kernel"], ["", "blocks/0", "blocks/0/drop", "drop"]),
    (PARAMS, MODULES),
    ([], []),
]


@pytest.mark.parametrize("trained, expected", TABLE, ids=[str(row[0]) for row in TABLE])
def test_a_module_trains_when_something_of_its_own_learns(trained, expected):
    on = training_selector(PARAMS, trained)
    assert [path for path in MODULES if on(path)] == expected


def test_a_module_with_frozen_leaves_of_its_own_is_off_whatever_trains_below_it():
    on = training_selector(["block/scale", "block/fc/kernel"], ["block/fc/kernel"])
    assert (on("block"), on("block/fc"), on("block/drop")) == (False, True, True)


def test_the_parts_of_an_extended_model_are_no_part_of_a_module_path():
    params = ["model/head/kernel", "model/stem/kernel", "aux/projector/kernel"]
    on = training_selector(params, ["aux/projector/kernel", "model/head/kernel"])
    assert [path for path in ("", "head", "stem", "model", "projector", "aux/projector") if on(path)] == [
        "", "head", "model", "projector", "aux/projector",
    ]  # fmt: skip


def test_selectors_of_the_same_leaves_are_equal_and_hash_alike():
    a, b = (training_selector(iter(PARAMS), ["head/fc/bias"]) for _ in range(2))
    assert a == b and hash(a) == hash(b) and a != training_selector(PARAMS, ["stem/bn/bias"])
    assert repr(a) == "modules of 1 trained leaves" and repr(a.function) == "TrainedModules(head/fc/bias)"


def test_a_trained_path_that_is_no_parameter_raises():
    with pytest.raises(tj.SelectionError) as error:
        training_selector(["head/kernel"], ["lora/head/kernel", "head/kernel"])
    assert str(error.value) == (
        "1 trained paths are no parameters of the model: lora/head/kernel. Pass paths of the model without a group's "
        "name in front and without an adapter's behind."
    )


def test_missing_auxiliary_weights_raise_with_the_line_that_adds_them():
    params = {"model": {"head": 1.0}, "aux": {"projector": 2.0}}
    assert auxiliary(params, "projector") == 2.0 and is_extended(params) and not is_extended(params["model"])
    with pytest.raises(tj.SelectionError) as error:
        auxiliary(params, "variance")
    assert str(error.value) == (
        "the model has no auxiliary weights 'variance'. It has projector. "
        "Add them first: model = tj.extend(model, 'variance', init)."
    )
    with pytest.raises(tj.SelectionError, match=r"no auxiliary weights 'variance'\. It has none\. Add them first"):
        auxiliary({"head": 1.0}, "variance")


def test_auxiliary_weights_are_a_pytree_with_paths():
    from transferjax.tree._modules import Auxiliary

    tree = Auxiliary({"b": {"kernel": 1.0}, "a": 2.0})
    assert list(tj.paths(tree)) == ["a", "b/kernel"]
    assert isinstance(jax.tree.map(lambda x: x, tree), Auxiliary)
