"""Texts to tokens."""

import json
import sys

import pytest

from transferjax._errors import DataError
from transferjax.data import tokenizer

WORDS = {"[PAD]": 5, "[UNK]": 1, "a": 2, "cat": 3, "sat": 4}


@pytest.fixture
def folder(tmp_path):
    model = {"type": "WordLevel", "vocab": WORDS, "unk_token": "[UNK]"}
    padding = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 5, "pad_type_id": 0,
        "pad_token": "[PAD]",
    }  # fmt: skip
    facts = {"version": "1.0", "model": model, "pre_tokenizer": {"type": "Whitespace"}, "padding": padding}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**facts, "added_tokens": []}))
    return tmp_path


def test_texts_are_padded_to_the_longest_with_the_file_s_own_padding(folder):
    found = tokenizer(folder)(["a cat sat", "cat"])
    assert found["input_ids"].tolist() == [[2, 3, 4], [3, 5, 5]]
    assert found["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert found["token_type_ids"].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert {array.dtype.name for array in found.values()} == {"int32"}


def test_texts_are_cut_and_padded_to_a_length(folder):
    found = tokenizer(folder / "tokenizer.json", max_length=2, pad_to=4)(["a cat sat", "dog"])
    assert found["input_ids"].tolist() == [[2, 3, 5, 5], [1, 5, 5, 5]]


def test_tokens_become_text(folder):
    made = tokenizer(folder)
    assert made.decode(made(["a cat"])["input_ids"][0]) == "a cat"
    assert repr(made).endswith("tokenizer.json', 5 tokens)")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("a cat", r"expects a list of strings, got one string. Write tokenizer\(\[text\]\)"),
        (["a", 3], "expects a list of strings, got int"),
        ([], "expects at least one text, got none"),
    ],
)
def test_texts_of_another_form(texts, message, folder):
    with pytest.raises(DataError, match=message):
        tokenizer(folder)(texts)


def test_files_of_another_form(folder, tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer at '.*no\.json'. Expected a tokenizer.json, or the folder"):
        tokenizer(tmp_path / "no.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(DataError, match=r"'.*other.json' is no tokenizer: "):
        tokenizer(tmp_path / "other.json")
    with pytest.raises(DataError, match="max_length is 0; expected a whole number of at least 1"):
        tokenizer(folder, max_length=0)


def test_without_the_package_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        DataError, match=r'needs the package tokenizers. Install it with `pip install "transferjax\[text\]"`'
    ):
        tokenizer(folder)
