"""Movement: a bar per leaf, module or stage, in the order of the network."""

import numpy as np
import pytest

from transferjax import Report, SelectionError, TransferError, finetune
from transferjax.report import movement
from transferjax.report._style import BLUE, ORANGE

BASE = {"head": {"bias": np.zeros(2), "kernel": np.ones(8)}, "stem": {"kernel": np.ones(8)}}
TUNED = {"head": {"bias": np.ones(2), "kernel": np.full(8, 1.5)}, "stem": {"kernel": np.ones(8)}}


def names(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_every_leaf_has_a_bar_with_its_number():
    axes = movement(finetune.movement(BASE, TUNED)).axes[0]
    assert names(axes) == ["head/bias", "head/kernel", "stem/kernel"]
    assert texts(axes) == ["from zero", "0.5", "equal"]
    assert [bar.get_width() for bar in axes.patches] == [0.5, 0.5, 0.0]
    assert len({bar.get_facecolor() for bar in axes.patches[:2]}) == 2


def test_stages_stand_in_the_order_of_the_network_with_all_their_entries_together():
    axes = movement(finetune.movement(BASE, TUNED), order=["stem/**", "nothing/**", "head/kernel"]).axes[0]
    assert names(axes) == ["stem", "head/kernel", "others"]
    axes = movement(finetune.movement(BASE, TUNED), order=["stem/**", "head/**"]).axes[0]
    assert names(axes) == ["stem", "head"] and axes.get_ylim()[0] > axes.get_ylim()[1]
    assert axes.patches[1].get_width() == pytest.approx(np.sqrt((2 + 8 * 0.25) / 8))


def test_of_many_leaves_there_is_a_bar_per_module():
    base = {f"blocks.{n}.{part}.weight": np.ones(2) for n in range(12) for part in "abcd"} | {"bias": np.ones(1)}
    tuned = {path: leaf + ("blocks.3" in path) for path, leaf in base.items()}
    axes = movement(finetune.movement(base, tuned)).axes[0]
    assert names(axes) == ["bias", *(f"blocks/{n}" for n in range(12))]
    assert texts(axes) == ["1" if name == "blocks/3" else "equal" for name in names(axes)]


def test_a_flat_list_of_many_leaves_keeps_its_bars():
    tree = {f"w{n}": np.ones(1) for n in range(50)}
    assert len(names(movement(finetune.movement(tree, tree)).axes[0])) == 50


def test_frozen_leaves_that_moved_stand_out():
    figure = movement(finetune.movement(BASE, TUNED, frozen="*/kernel"))
    colours = [bar.get_facecolor() for bar in figure.axes[0].patches]
    hexes = ["#{:02X}{:02X}{:02X}".format(*(round(255 * c) for c in colour[:3])) for colour in colours]
    assert hexes[1:] == [ORANGE, BLUE] and "orange: frozen" in figure.axes[0].get_title(loc="left")


def test_very_different_changes_are_drawn_on_a_logarithmic_axis():
    base = {name: np.ones(4) for name in "abcd"}
    tuned = {name: leaf + change for (name, leaf), change in zip(base.items(), (1e-4, 1.0, 0.0, np.nan))}
    axes = movement(finetune.movement(base, tuned)).axes[0]
    assert axes.get_xscale() == "log" and texts(axes) == ["0.0001", "1", "equal", "nan"]
    ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
    assert ends[:2] == pytest.approx([1e-4, 1.0]) and axes.get_xlim()[0] == pytest.approx(1e-5)


def test_what_cannot_be_drawn_raises():
    with pytest.raises(TransferError, match=r"movement\(\) draws what transferjax\.finetune\.movement returns, with"):
        movement(Report("Other", ("path", "change"), (("a", 1.0),)))
    with pytest.raises(SelectionError, match=r"movement\(\): order matches none of 3 leaves\. It has body/\*\*; the"):
        movement(finetune.movement(BASE, TUNED), order=["body/**"])
    with pytest.raises(SelectionError, match=r"movement\(\) expects order as a list of selectors"):
        movement(finetune.movement(BASE, TUNED), order="stem/**")
