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
