"""How problems are told, and that nothing is compared by spelling unless something is wrong."""

import jax
import numpy as np
import pytest

from transferjax._errors import PlanError
from transferjax.surgery import Spec, plan, rename, torch_layout
from transferjax.surgery import _problems as say
from transferjax.tree import nest

F = "float32"


def test_the_nearest_leaf_shares_words_and_sizes():
    pool = {"fc.weight": Spec((10, 4), F), "fc.bias": Spec((10,), F), "stem.weight": Spec((4, 10), F)}
    finder = say.Finder(pool)
    assert finder.nearest("fc/kernel", Spec((4, 10), F), 2) == ["fc.weight", "stem.weight"]
    assert finder.nearest("fc/bias", Spec((10,), F), 1) == ["fc.bias"]
    assert finder.hint("fc/bias", Spec((7,), F))[1] is None
    assert say.Finder({}).hint("a", Spec((1,), F)) == ("", None)


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
    assert "\nthe plan has 7 problems:\n- " in str(e.value)
