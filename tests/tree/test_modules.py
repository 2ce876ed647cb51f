import pytest

from transferjax._errors import SelectionError
from transferjax.tree import Selector, auxiliary, training_selector
from transferjax.tree._modules import Auxiliary

PARAMS = ("stem/conv/kernel", "stem/bn/scale", "blocks/0/conv/kernel", "blocks/0/norm/bias", "blocks/1/conv/kernel",
          "head/kernel", "head/bias", "positions")  # fmt: skip
MODULES = ("", "stem", "stem/conv", "stem/bn", "stem/plain_bn", "blocks", "blocks/0", "blocks/0/conv", "blocks/0/norm",
           "blocks/0/dropout", "blocks/1", "blocks/1/conv", "blocks/1/drop/inner", "head", "dropout")  # fmt: skip


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        ((), ()),
        (("head/bias",), ("head", "dropout")),
        (("positions",), ("", "dropout")),
        (("stem/bn/scale",), ("stem", "stem/bn", "stem/plain_bn", "dropout")),
        (("stem/conv/kernel",), ("stem", "stem/conv", "stem/plain_bn", "dropout")),
        (("blocks/1/conv/kernel",), ("blocks", "blocks/1", "blocks/1/conv", "blocks/1/drop/inner", "dropout")),
        (PARAMS, MODULES),
    ],
)
def test_a_module_trains_with_its_own_leaves_and_without_any_with_its_surroundings(trained, expected):
    selector = training_selector(PARAMS, trained)
    # "" owns `positions`, so it follows that leaf alone; `dropout` owns nothing and follows everything beneath "".
    assert tuple(module for module in MODULES if selector(module)) == expected


def test_selectors_of_the_same_paths_are_equal_and_hash_alike():
    one, two = (training_selector(list(PARAMS), {"head/bias"}) for _ in range(2))
    assert isinstance(one, Selector)
    assert one == two
    assert hash(one) == hash(two)
    assert one != training_selector(PARAMS, ["head/kernel"])
    assert repr(one) == "modules of 1 trained leaves"
    assert repr(one.function) == "TrainedModules(head/bias)"


def test_the_parts_of_an_extended_model_are_no_modules():
    selector = training_selector(["model/head/kernel", "model/stem/kernel", "aux/map/kernel"], ["model/head/kernel"])
    assert [module for module in ("", "head", "stem", "map") if selector(module)] == ["", "head", "map"]
    alone = training_selector(["model/head/kernel", "aux/map/kernel"], ["aux/map/kernel"])
    assert not any(map(alone, ("", "head", "map")))


def test_a_path_that_is_no_parameter_raises():
    with pytest.raises(SelectionError, match="1 trained paths are no parameters of the model: lora/head/kernel"):
        training_selector(PARAMS, ["lora/head/kernel"])


def test_auxiliary_weights_by_name():
    params = {"model": {}, "aux": {"map": 1, "bias": 2}}
    assert auxiliary(params, "map") == 1
    with pytest.raises(
        SelectionError, match=r"no auxiliary weights 'mpa'. It has bias, map. Add them first: model = tj.e"
    ):
        auxiliary(params, "mpa")
    with pytest.raises(SelectionError, match="It has none"):
        auxiliary({"kernel": 1}, "map")
    assert Auxiliary({"a": 1})["a"] == 1
