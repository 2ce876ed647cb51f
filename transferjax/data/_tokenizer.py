"""Texts to tokens, through the optional package ``tokenizers``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from transferjax._errors import DataError, describe, is_whole


class Tokenizer:
    """Texts to arrays of tokens, made by :func:`tokenizer`.

    >>> from tokenizers import Tokenizer as Inner, models
    >>> Tokenizer(Inner(models.WordLevel({"cat": 0, "?": 1}, unk_token="?")), "cats")(["cat"])["input_ids"].tolist()
    [[0]]
    """

    def __init__(self, inner: Any, name: str):
        self._inner, self._name = inner, name

    def __repr__(self) -> str:
        return f"Tokenizer('{self._name}', {self._inner.get_vocab_size():,} tokens)"

    def __call__(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Tokens of several texts, padded to the longest.

        Args:
          texts: ``B`` strings.

        Returns:
          ``input_ids``, ``attention_mask`` (0 where there is padding) and ``token_type_ids``, each ``[B, T]`` int32.

        Raises:
          DataError: a single string, something that is no string, or no text.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            got = "one string" if isinstance(texts, str) else describe(next(t for t in texts if not isinstance(t, str)))
            raise DataError(f"a tokenizer expects a list of strings, got {got}. Write tokenizer([text]).")
        found = self._inner.encode_batch(list(texts))
        if not found:
            raise DataError("a tokenizer expects at least one text, got none.")
        arrays = {
            "input_ids": [one.ids for one in found],
            "attention_mask": [one.attention_mask for one in found],
            "token_type_ids": [one.type_ids for one in found],
        }
        return {name: np.array(rows, np.int32) for name, rows in arrays.items()}

    def decode(self, tokens: Any) -> str:
        """The text of one row of ``input_ids``, without special tokens."""
        return self._inner.decode([int(token) for token in tokens])


def tokenizer(path: str | os.PathLike[str], *, max_length: int = 512, pad_to: int | None = None) -> Tokenizer:
    """A tokenizer from a ``tokenizer.json``, as Hugging Face folders hold it.

    Args:
      path: the file, or the folder that holds it.
      max_length: longer texts are cut to so many tokens, special ones included.
      pad_to: the number of tokens to which every text is padded, so that a compiled program sees one shape; by default
        the longest text of the call.

    Returns:
      ``texts -> {"input_ids", "attention_mask", "token_type_ids"}``; the inputs of a text model.

    Raises:
      DataError: the package ``tokenizers`` is not installed, there is no such file, or it is no tokenizer.

    >>> import json, tempfile, pathlib
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> vocabulary = {"[PAD]": 0, "[UNK]": 1, "a": 2, "cat": 3}
    >>> model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    >>> split = {"type": "Whitespace"}
    >>> text = json.dumps({"version": "1.0", "model": model, "pre_tokenizer": split, "added_tokens": []})
    >>> _ = (folder / "tokenizer.json").write_text(text)
    >>> tokenizer(folder)(["a cat", "cat"])["input_ids"].tolist()
    [[2, 3], [3, 0]]
    """
    try:
        import tokenizers
    except ImportError:
        raise DataError(
            'tokenizer() needs the package tokenizers. Install it with `pip install "transferjax[text]"`.'
        ) from None
    where = os.fspath(path)
    where = os.path.join(where, "tokenizer.json") if os.path.isdir(where) else where
    if not os.path.isfile(where):
        raise DataError(f"there is no tokenizer at '{where}'. Expected a tokenizer.json, or the folder that holds one.")
    for name, value in {"max_length": max_length, **({} if pad_to is None else {"pad_to": pad_to})}.items():
        if not is_whole(value):
            raise DataError(f"{name} is {value!r}; expected a whole number of at least 1.")
    try:
        inner = tokenizers.Tokenizer.from_file(where)
    except Exception as error:  # the package raises plain Exception
        raise DataError(f"'{where}' is no tokenizer: {error}.") from None
    padding = inner.padding or {}
    inner.enable_truncation(max_length)
    inner.enable_padding(pad_id=padding.get("pad_id", 0), pad_token=padding.get("pad_token", "[PAD]"), length=pad_to)
    return Tokenizer(inner, where)
