"""What Keras 3 calls its layers and variables: its weights files say only ``layers/conv2d_1/vars/0``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from transferjax._errors import CheckpointError, listing
from transferjax.tree import natural

_LAST = 1 << 30
_KERNEL = ("kernel", "bias")
_CONVOLUTIONS = [f"{kind}{n}d" for n in (1, 2, 3) for kind in ("conv", "depthwise_conv")]
_CELL = ("kernel", "recurrent_kernel", "bias")
_VARIABLES: dict[str, tuple[str, ...]] = {
    "dense": _KERNEL, "einsum_dense": _KERNEL, "embedding": ("embeddings",),
    **{f"{kind}{end}": _KERNEL for kind in _CONVOLUTIONS for end in ("", "_transpose")},
    **{f"separable_conv{n}d": ("depthwise_kernel", "pointwise_kernel", "bias") for n in (1, 2)},
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "layer_normalization": ("gamma", "beta"), "group_normalization": ("gamma", "beta"),
    "rms_normalization": ("scale",), "normalization": ("mean", "variance", "count"),
    **{f"{kind}_cell": _CELL for kind in ("lstm", "gru", "simple_rnn", "conv_lstm1d", "conv_lstm2d", "conv_lstm3d")},
    "p_re_lu": ("alpha",), "seed_generator": ("seed_generator_state",),
}  # fmt: skip
_SWITCHES = {"bias": "use_bias", "gamma": "scale", "beta": "center"}


def snake_case(name: str) -> str:
    """A class's name as Keras writes it into a weights file.

    >>> snake_case("Conv2D"), snake_case("BatchNormalization"), snake_case("LSTM")
    ('conv2d', 'batch_normalization', 'lstm')
    """
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def variable_names(kind: str, config: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """The names of a layer's variables in the order in which Keras stores them; numbers if the class is not known.

    Args:
      kind: the class in snake case.
      config: the layer's own configuration, or ``{}``.
      count: how many there are.

    >>> variable_names("batch_normalization", {"scale": False}, 3)
    ('beta', 'moving_mean', 'moving_variance')
    >>> variable_names("dense", {}, 1), variable_names("batch_normalization", {}, 3)
    (('kernel',), ('0', '1', '2'))
    """
    every = _VARIABLES.get(kind, ())
    switched = tuple(name for name in every if config.get(_SWITCHES.get(name, ""), True) is not False)
    for names in (switched, every[:-1] if every[-1:] == ("bias",) else every):
        if len(names) == count:
            return names
    return tuple(map(str, range(count)))


class Names:
    """The names of all arrays of one weights file.

    Args:
      paths: of the datasets.
      titles: ``{group: name}`` of the layers that say how they are called (Keras since 3.6 writes it).
      config: ``config.json``, or ``None``.
      where: for errors.
    """

    def __init__(self, paths: Iterator[str] | list[str], titles: Mapping[str, str], config: Any, where: str):
        self._titles, self._where = titles, where
        self._counts: dict[str, int] = {}
        self._layers: dict[str, tuple[int, str, str, Any]] = {}
        for path in paths:
            group = path.rpartition("/")[0]
            self._counts[group] = self._counts.get(group, 0) + 1
        self._root = config if isinstance(config, dict) else {}

    def of(self, path: str) -> tuple[list[Any], str]:
        """``(sort key, name)`` of one dataset."""
        parts = path.split("/")
        if parts[0] == "optimizer" or len(parts) < 2 or parts[-2] != "vars" or parts[0] == "vars":
            return [(_LAST, natural(part)) for part in parts], path
        node, kind, names, key = self._root, "", [], []
        at, group = 0, ""
        while at < len(parts) - 2:
            part = parts[at]
            if part == "layers" and at + 1 < len(parts) - 2:
                group = f"{group}/layers/{parts[at + 1]}".lstrip("/")
                place, name, kind, node = self._layer(group, parts[at + 1], node)
                at += 2
            else:
                group = f"{group}/{part}".lstrip("/")
                place, name = 0, part
                kind, node = _inner(part, kind, node)
                at += 1
            names.append(name)
            key.append((place, natural(name)))
        count = self._counts[path.rpartition("/")[0]]
        number = int(parts[-1]) if parts[-1].isdecimal() and len(parts[-1]) < 8 else count
        if number >= count:
            raise CheckpointError(f"'{path}' in {self._where} is not one of variables 0 to {count - 1}. It is damaged.")
        names.append(variable_names(kind, _config(node), count)[number])
        return [*key, (number, ())], "/".join(names)

    def _layer(self, group: str, key: str, model: Any) -> tuple[int, str, str, Any]:
        """``(place, name, class, node)`` of an element of a list of layers."""
        if group not in self._layers:
            self._layers[group] = self._find(group, key, model)
        return self._layers[group]

    def _find(self, group: str, key: str, model: Any) -> tuple[int, str, str, Any]:
        title = self._titles.get(f"{group}/vars")
        known = list(_numbered(_config(model).get("layers")))
        kind = re.sub(r"_\d+$", "", key)
        if not known:
            return 0, title or key, kind, {}
        if title is not None:
            known = [(place, key, node) for place, _, node in known if _title(node) == title and _kind(node) == kind]
        for place, found, node in known:
            if found == key:
                return place, str(_title(node)), _kind(node), node
        raise CheckpointError(
            f"'{group}' in {self._where}{f' (called {title!r})' if title else ''} is no layer of config.json, which "
            f"has {listing([str(_title(node)) for _, _, node in _numbered(_config(model).get('layers'))])}."
        )


def _numbered(layers: Any) -> Iterator[tuple[int, str, Any]]:
    """``(place, name in the weights file, node)`` of each layer; what has the class of an earlier one gets a number."""
    seen: dict[str, int] = {}
    for place, node in enumerate(layers if isinstance(layers, list) else []):
        if not isinstance(node, dict) or ".ops" in str(node.get("module")):
            continue  # an operation between layers has no weights and is not stored
        kind = _kind(node)
        seen[kind] = seen.get(kind, -1) + 1
        yield place, f"{kind}_{seen[kind]}" if seen[kind] else kind, node


def _inner(part: str, kind: str, node: Any) -> tuple[str, Any]:
    """``(class, node)`` of a layer that another holds as an attribute, as far as the outer one tells."""
    config = _config(node)
    if part in ("layer", "forward_layer", "backward_layer"):
        found = config.get(part) if part != "forward_layer" else None
        found = found if isinstance(found, dict) else config.get("layer")
        return (_kind(found), found) if isinstance(found, dict) else ("", {})
    if part == "cell":
        return f"{kind}_cell", {"config": config}
    if part.endswith("_dense") and kind in ("multi_head_attention", "group_query_attention", "grouped_query_attention"):
        return "einsum_dense", {"config": {"use_bias": config.get("use_bias", True)}}
    return re.sub(r"_\d+$", "", part), {}


def _config(node: Any) -> Mapping[str, Any]:
    found = node.get("config") if isinstance(node, dict) else None
    return found if isinstance(found, dict) else {}


def _kind(node: Any) -> str:
    return snake_case(str(node.get("class_name", "")))


def _title(node: Any) -> Any:
    return _config(node).get("name", node.get("name"))
