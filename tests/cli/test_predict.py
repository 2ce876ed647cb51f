"""predict: names and probabilities for image files."""

import json

import pytest

from transferjax.cli import main


def predict(capsys, *options):
    code = main(["predict", "run", "--json", *options])
    captured = capsys.readouterr()
    return (json.loads(captured.out) if code == 0 else None), captured.err


@pytest.fixture
def trained(finetune, capsys):
    assert finetune("--epochs", "30", "--learning-rate", "3e-2") == 0
    capsys.readouterr()


def test_class_names_travel_with_the_run(trained, capsys):
    report, _ = predict(capsys, "photos/dark/1.png", "photos/light/1.png", "--top", "2")
    assert [(row[0], row[1]) for row in report["rows"]] == [
        ("photos/dark/1.png", "dark"),
        ("photos/dark/1.png", "light"),
        ("photos/light/1.png", "light"),
        ("photos/light/1.png", "dark"),
    ]
    assert report["rows"][0][2] + report["rows"][1][2] == pytest.approx(1.0, abs=1e-5)


def test_damaged_and_missing_images_are_named(trained, photos, capsys):
    (photos / "broken.png").write_bytes(b"no image")
    assert "'photos/broken.png' cannot be read as an image" in predict(capsys, "photos/broken.png")[1]
    assert "'nowhere.png' cannot be read as an image: No such file" in predict(capsys, "nowhere.png")[1]
    report, error = predict(capsys, "photos/broken.png", "photos/dark/1.png", "--on-error", "skip", "--top", "1")
    assert [row[1] for row in report["rows"]] == ["dark"] and "broken.png" in error
    assert "no image could be read" in predict(capsys, "nowhere.png", "--on-error", "skip")[1]


def test_a_model_without_preprocess_cannot_read_files(finetune, capsys):
    assert finetune("--model", "tiny:without_preprocess") == 0
    capsys.readouterr()
    assert "tiny:without_preprocess has no preprocess" in predict(capsys, "photos/dark/1.png")[1]
