"""score: several sources ranked by their features, and by the classes they were trained on."""

import json
import textwrap

import jax
import numpy as np
import pytest

import transferjax as tj
from transferjax.cli import main
from transferjax.cli._score import _ranked, _ranks

DATA = ["--data", "sample", "--split", "train[:60]", "--size", "32"]
LITE = ["--model", "efficientnet_lite0"]

SOURCES = """
import numpy as np
import transferjax as tj

rng = np.random.default_rng(0)
STEM, HEAD = (0.1 * rng.normal(size=size).astype(np.float32) for size in ((3, 6), (6, 5)))

def apply(params, inputs):
    hidden = inputs.reshape(inputs.shape[0], -1, 3).mean(1) @ params["stem"]
    return hidden @ params["head"] if "head" in params else hidden

def make(**params):
    return tj.interop.pure(apply, params, preprocess=tj.Preprocess((8, 8)))

def features():
    return make(stem=STEM)

def told(num_classes):
    assert num_classes == 0
    return features()

def deaf(num_classes=None):
    return features()

def classifier(num_classes=5):
    return make(stem=STEM, head=HEAD) if num_classes else features()
"""


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A current directory with the module ``sources``: networks with and without classes of their own."""
    (tmp_path / "sources.py").write_text(textwrap.dedent(SOURCES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture
def passes(monkeypatch):
    """One entry for each pass of a network over the images."""
    made, extract = [], tj.features.extract
    monkeypatch.setattr(tj.features, "extract", lambda *a, **o: made.append(1) or extract(*a, **o))
    return made


@pytest.fixture
def score(capsys):
    def run(*options):
        assert main(["score", *DATA, *options, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        return {row[0]: dict(zip(report["columns"], row, strict=True)) for row in report["rows"]}, report

    return run


def test_sources_are_ranked_beside_the_pixels(score, passes):
    rows, report = score(*LITE, "--model", "efficientnet_lite1", *LITE, "--scores", "logme,knn_accuracy")
    assert report["columns"] == ["source", "logme", "knn_accuracy", "mean rank", "ranks"] and len(passes) == 2
    assert set(rows) == {"pixels", "efficientnet_lite0", "efficientnet_lite1"}
    means = [row[3] for row in report["rows"]]
    assert means == sorted(means) and sum(means) == pytest.approx(6)
    logme = sorted(rows.values(), key=lambda row: -row["logme"])
    assert logme[0]["ranks"].startswith("1") and set(report["metadata"]) == {"data", "images", "order"}


def test_leep_and_nce_read_the_classes_of_imagenet_in_one_more_pass(score, passes):
    usual, _ = score(*LITE, "--scores", "logme,knn_accuracy")
    assert len(passes) == 1
    rows, report = score(*LITE, "--scores", "logme,leep,knn_accuracy,nce")
    assert len(passes) == 3
    source = tj.data.open("sample", "train[:60]")
    images, labels = (np.stack([source[i][name] for i in range(60)]) for name in ("image", "label"))
    model = tj.data.on_images(tj.models.load("efficientnet_lite0")[0], 32)
    probs = np.asarray(jax.nn.softmax(model.apply(model.params, model.extra, images)[0], axis=-1))
    assert probs.shape == (60, 1000)
    found = rows["efficientnet_lite0"]
    assert found["leep"] == pytest.approx(tj.scores.leep(probs, labels), abs=1e-4)
    assert found["nce"] == pytest.approx(tj.scores.nce(probs.argmax(-1), labels), abs=1e-9)
    assert rows["pixels"]["leep"] is None and rows["pixels"]["nce"] is None
    for name, row in usual.items():
        assert (rows[name]["logme"], rows[name]["knn_accuracy"]) == (row["logme"], row["knn_accuracy"])
    assert rows["pixels"]["mean rank"] == usual["pixels"]["mean rank"]
    assert report["metadata"]["empty cells"] == "sources without classes of their own"


def test_a_source_without_classes_has_an_empty_cell_and_no_rank_there(sources, score):
    names = [f"sources:{name}" for name in ("features", "told", "deaf", "classifier")]
    rows, _ = score(*LITE, *(part for name in names for part in ("--model", name)), "--scores", "knn_accuracy,leep,nce")
    with_classes = {"efficientnet_lite0", "sources:classifier"}
    assert {name for name, row in rows.items() if row["leep"] is not None} == with_classes
    assert {name for name, row in rows.items() if row["nce"] is not None} == with_classes
    ranks = _ranks([row["knn_accuracy"] for row in rows.values()])
    for (name, row), rank in zip(rows.items(), ranks, strict=True):
        if name not in with_classes:
            assert row["mean rank"] == rank and row["ranks"] == f"{rank:g} to {rank:g}"
    leep = sorted(with_classes, key=lambda name: -rows[name]["leep"])
    assert rows[leep[0]]["ranks"].startswith("1 to")


def test_without_scores_of_features_the_pixels_are_last_and_nothing_is_extracted(sources, score, passes, capsys):
    rows, report = score("--model", "sources:classifier", "--model", "sources:features", "--scores", "leep")
    assert [row[0] for row in report["rows"]] == ["sources:classifier", "pixels", "sources:features"]
    assert rows["sources:classifier"]["leep"] < 0 and len(passes) == 1
    assert report["rows"][1] == ["pixels", None, None, None] and report["rows"][0][2:] == [1.0, "1 to 1"]
    assert main(["score", *DATA, "--model", "sources:classifier", "--scores", "leep"]) == 0
    assert "\npixels\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["features", "told", "deaf"])
def test_without_classes_leep_and_nce_say_what_they_need_before_any_pass(sources, passes, capsys, name):
    assert main(["score", *DATA, "--model", f"sources:{name}", "--scores", "logme,leep,nce"]) == 1
    told = capsys.readouterr().err
    assert (
        f"--scores leep,nce needs a source's own class probabilities, and no --model has classes: sources:{name}."
        in told
    )
    assert (
        "a model of the zoo, or a function whose num_classes has a default" in told and "write --scores nleep" in told
    )
    assert passes == []


def test_the_help_says_what_leep_and_nce_read(capsys):
    assert main(["score", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "leep and nce read the classes that a network was trained on, in one more pass" in text
    assert "knn_accuracy, leep, nce (logme,h_score_regularized,knn_accuracy)" in text


def test_equal_values_share_their_ranks_and_none_has_none():
    assert _ranks([0.5, 0.9, 0.5, 0.1]).tolist() == [2.5, 1.0, 2.5, 4.0]
    np.testing.assert_array_equal(_ranks([None, 0.9, 0.5, None]), [np.nan, 1, 2, np.nan])


def test_rows_are_ordered_by_the_mean_of_the_ranks_they_have():
    rows = _ranked(["a", "b", "c", "d"], [[None, None], [1.0, -3.0], [2.0, None], [3.0, -4.0]])
    assert rows == [
        ("d", 3.0, -4.0, 1.5, "1 to 2"),
        ("b", 1.0, -3.0, 2.0, "1 to 3"),
        ("c", 2.0, None, 2.0, "2 to 2"),
        ("a", None, None, None, None),
    ]


def test_a_score_that_is_none_is_named(capsys):
    assert main(["score", *DATA, "--model", "efficientnet_lite0", "--scores", "magic"]) == 2
    assert "'magic' is no score; expected some of logme" in capsys.readouterr().err
