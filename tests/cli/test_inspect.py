"""inspect: what a file holds, and what it says about files that it cannot read."""

import json

import numpy as np
import pytest

from transferjax.cli import main


@pytest.fixture
def weights(tmp_path):
    np.savez(tmp_path / "weights.npz", **{"a/kernel": np.ones((2, 3), np.float32), "a/bias": np.zeros(3, np.float16)})
    return tmp_path / "weights.npz"


def test_arrays_sizes_and_digest_are_listed(weights, capsys):
    assert main(["inspect", str(weights), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] == [["a/bias", "(3,)", "float16", 3, 6], ["a/kernel", "(2, 3)", "float32", 6, 24]]
    assert {k: report["metadata"][k] for k in ("format", "arrays", "values", "bytes")} == {
        "format": "npz",
        "arrays": 2,
        "values": 9,
        "bytes": 30,
    }
    assert report["metadata"]["digest"].startswith("sha256:") and len(report["metadata"]["digest"]) == 71
    assert report["metadata"]["integrity"] in ("verified", "unverified")


def test_help_names_every_kind_of_file(capsys):
    assert main(["inspect", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(kind in text for kind in ("torch", "safetensors", ".npz", "msgpack", "Keras", "Hugging Face", "Orbax"))


def test_plain_text_is_aligned(weights, capsys):
    assert main(["inspect", str(weights)]) == 0
    assert "a/kernel  (2, 3)  float32" in capsys.readouterr().out


def test_another_digest_raises(weights, capsys):
    assert main(["inspect", str(weights), "--digest", "0" * 64]) == 1
    assert "is not the expected file" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04broken"])
def test_a_damaged_file_raises(tmp_path, content, capsys):
    (tmp_path / "weights.npz").write_bytes(content)
    assert main(["inspect", str(tmp_path / "weights.npz")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("transferjax inspect: ") and "weights.npz" in error and error.count("\n") == 1


def test_a_run_shows_its_newest_checkpoint(finetune, capsys):
    assert finetune() == 0
    capsys.readouterr()
    shown = []
    for path in ("run", "run/checkpoints", "run/checkpoints/6"):
        assert main(["inspect", path, "--json"]) == 0
        shown.append(json.loads(capsys.readouterr().out))
    assert [report["metadata"]["checkpoint"] for report in shown] == ["run/checkpoints/6"] * 3
    names = [row[0] for row in shown[0]["rows"]]
    assert names == [row[0] for row in shown[1]["rows"]] and "trainable/head/head/fc/kernel" in names
    assert main(["inspect", "run/checkpoints/3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metadata"]["checkpoint"] == "run/checkpoints/3"


def test_a_run_without_a_checkpoint_says_so(tmp_path, capsys):
    import transferjax as tj

    tj.io.Run.create(tmp_path / "run", {"seed": 0})
    assert main(["inspect", str(tmp_path / "run")]) == 1
    assert "run' has no checkpoint yet. Go on with it by `finetune --resume` first." in capsys.readouterr().err
