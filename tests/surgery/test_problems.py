"""How problems are told, and that nothing is compared by spelling unless something is wrong."""

import jax
import numpy as np
import pytest

from transferjax._errors import PlanError
from transferjax.surgery import Spec, plan, rename, split, torch_layout
from transferjax.surgery import _problems as say
from transferjax.tree import nest

F = "float32"


def test_the_nearest_leaf_shares_words_and_sizes():
    pool = {"fc.weight": Spec((10, 4), F), "fc.bias": Spec((10,), F), "stem.weight": Spec((4, 10), F)}
    finder = say.Finder(pool)
    assert finder.nearest("fc/kernel", Spec((4, 10), F), 2) == ["fc.weight", "stem.weight"]
    assert finder.nearest("fc/bias", Spec((10,), F), 1) == ["fc.bias"]
    side = say.Finder({"fc/bias": Spec((7,), F)})
    assert finder.hint("fc/bias", Spec((7,), F), side)[1] is None
    assert say.Finder({}).hint("a", Spec((1,), F), side) == ("", None)


def test_gamma_is_a_scale_and_beta_is_none():
    spec = Spec((8,), F)
    finder = say.Finder({"bn/beta": spec, "bn/gamma": spec})
    assert finder.nearest("bn/scale", spec, 1) == ["bn/gamma"] and finder.nearest("bn/bias", spec, 1) == ["bn/beta"]
    with pytest.raises(PlanError) as error:
        plan({"bn/beta": np.zeros(8), "bn/gamma": np.zeros(8)}, {"bn": {"scale": np.zeros(8)}})
    text = str(error.value)
    assert "Write rename('bn/gamma', 'bn/scale') or fresh('bn/scale')." in text
    assert (
        "source 'bn/beta' (8,) float64 has no target. Nearest without a source: 'bn/scale' (8,) float64. Write waive"
        in text
    )


def test_a_source_is_offered_to_one_target_only():
    target = {name: np.zeros(8) for name in ("a/bias", "b/bias", "c/bias")}
    with pytest.raises(PlanError) as error:
        plan({"c.bias": np.zeros(8)}, nest(target))
    text = str(error.value)
    assert text.count("rename(") == 2 and text.count(r"rename(r'c\.bias', 'c/bias')") == 2  # told from both sides


def test_a_cut_along_the_wrong_axis_is_named_before_the_layout():
    parts = tuple(f"{part}/kernel" for part in "qkv")
    with pytest.raises(PlanError) as error:
        plan(
            {"qkv": np.zeros((8, 24))},
            nest(dict.fromkeys(parts, np.zeros((8, 8)))),
            split("qkv", parts, axis=1),
            torch_layout(),
        )
        plan({"qkv": np.zeros((12, 6))}, nest(dict.fromkeys(parts, np.zeros((4, 6)))), split("qkv", parts, axis=1))
    text = str(error.value)
    assert (
        "It is cut along axis 1 of the source: if that is the wrong one, write another axis= in its rule. The" in text
    )


def test_one_problem_stands_alone_and_several_are_counted():
    problems = say.Problems()
    problems.raise_all()
    problems.add("shape", "first.")
    with pytest.raises(PlanError, match=r"^first\.$"):
        problems.raise_all()
    problems.add("idle", lambda: "second.")
    with pytest.raises(PlanError, match=r"^the plan has 2 problems:\n- second\.\n- first\.$"):
        problems.raise_all()


def test_what_is_not_told_is_counted_and_its_text_never_made():
    problems = say.Problems()
    for number in range(say.LIMIT):
        problems.add("missing", f"leaf {number}.", f"p{number}")
    problems.add("missing", lambda: pytest.fail("made"), "last")
    with pytest.raises(PlanError, match="1 more target leaves without a source: last"):
        problems.raise_all()


def test_ten_thousand_leaves_are_planned_without_comparing_spellings(monkeypatch):
    monkeypatch.setattr(say, "SequenceMatcher", None)
    monkeypatch.setattr(say, "nearest_hint", None)
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)
    source = {f"layers.{i}.w.weight": leaf(8, 4) for i in range(10_000)}
    target = nest({f"layers/{i}/w/kernel": leaf(4, 8) for i in range(10_000)})
    made = plan(source, target, rename(r"layers\.(\d+)\.w\.weight", r"layers/\1/w/kernel"), torch_layout())
    assert made.moves[9_999].source == "layers.9999.w.weight"


def test_a_source_of_another_convention_is_called_that_first():
    source = {f"layer{i}.w": jax.ShapeDtypeStruct((2,), np.float32) for i in range(4)}
    target = {"stem": {"kernel": jax.ShapeDtypeStruct((2,), np.float32)}}
    with pytest.raises(
        PlanError, match=r"(?s)^the source does not look like one of the model and naming convention"
    ) as e:
        plan(source, target, rename(r"_conv\.weight", "stem/kernel"), rename(r"_bn\.weight", "stem/scale"))
    assert "none of its 4 names ('layer0.w', 'layer1.w', 'layer2.w' and 1 more)" in str(e.value)
    lines = str(e.value).splitlines()
    assert "surgery.align(...) proposes" in lines[0] and lines[1] == "the plan has 7 problems:"
    assert [line.split()[1] for line in lines[2:5]] == ["target", "source", "rename(r'_conv\\.weight',"]
    assert lines[5] == "and 4 more." and len(lines) == 6
