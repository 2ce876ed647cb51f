"""Files of Keras without Keras: ``.keras`` archives, ``.weights.h5``, and whole models in one older ``.h5``.

Layers have the names that ``config.json`` gives them, variables those of their classes: ``stem/kernel``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transferjax._errors import CheckpointError
from transferjax.io._bytes import FileBytes, read
from transferjax.io._hdf5 import Tree, read_tree
from transferjax.io._keras_names import Names
from transferjax.io._reader import Entry, Reader
from transferjax.io._safetensors import parse_json
from transferjax.io._zip import Member

WEIGHTS, CONFIG = "model.weights.h5", "config.json"
_LONGEST_CONFIG = 1 << 28


def read_hdf5(file: FileBytes) -> Reader:
    """An HDF5 file: of Keras 3's ``save_weights``, an older whole model, older weights, or anything else.

    Raises:
      CheckpointError: h5py is missing, or the file is damaged.
    """
    tree = read_tree(file)
    root = tree.attributes[""]
    if "model_weights" in tree.attributes or "layer_names" in root or "layer_names0" in root:
        return _reader(file, "keras-legacy", _legacy(tree, file.where), _legacy_facts(root, file.where), False)
    if any("/vars/" in f"/{name}" for name in tree.entries):
        return _reader(file, "keras-weights", _modern(tree, None, file.where), {}, False)
    facts = {name: value for name, value in root.items() if isinstance(value, str)}
    return _reader(file, "hdf5", dict(tree.entries), facts, False)


def read_keras(file: FileBytes, archive: Mapping[str, Member]) -> Reader:
    """A ``.keras`` archive; its arrays are covered by the archive's checksums, verified when first read.

    Raises:
      CheckpointError: a member is missing or damaged, or the weights do not fit the layers of ``config.json``.
    """
    for name in (WEIGHTS, CONFIG):
        if name not in archive:
            raise CheckpointError(f"{file.where} has no member '{name}', which a .keras file has. It is incomplete.")
    config = _json(archive[CONFIG])
    metadata = {"config": config}
    if "metadata.json" in archive:
        metadata["keras"] = _json(archive["metadata.json"])
    member = archive[WEIGHTS]
    tree = read_tree(member, member.unverified())
    return _reader(file, "keras", _modern(tree, config, file.where), metadata, True)


def _reader(file: FileBytes, format: str, entries: Mapping[str, Entry], facts: Any, checked: bool) -> Reader:
    if not entries:
        raise CheckpointError(f"{file.where} holds no arrays.")
    return Reader(format, entries, facts, None, checked, file.sha256)


def _json(member: Member) -> Any:
    if member.size > _LONGEST_CONFIG:
        raise CheckpointError(f"{member.where} claims {member.size} bytes, more than any configuration.")
    return parse_json(bytes(read(member, 0, member.size)), member.where)


# Keras 1 and 2, and Keras 3 into .h5: a group per layer, in it the names that the variables have by themselves.


def _legacy(tree: Tree, where: str) -> dict[str, Entry]:
    above = "model_weights" if "model_weights" in tree.attributes else ""
    below = lambda name: f"{above}/{name}" if above else name
    out: dict[str, Entry] = {}
    used: set[str] = set()
    for layer in _names(tree, above, "layer_names", where):
        group = below(layer)
        stored = _names(tree, group, "weight_names", where)
        short = [_within(layer, name) for name in stored]
        clear = len(set(short)) == len(short)
        for full, name in zip(stored, short):
            path = f"{group}/{full}"
            if path not in tree.entries:
                raise CheckpointError(f"{where} lists the weight '{path}', but does not hold it. It is damaged.")
            _put(out, f"{layer}/{name if clear else full}", tree.entries[path], where)
            used.add(path)
    listed = [f"optimizer_weights/{name}" for name in _names(tree, "optimizer_weights", "weight_names", where)]
    for path in dict.fromkeys([*listed, *tree.entries]):
        if path in tree.entries and path not in used:
            name = path.removeprefix(f"{above}/") if above else path
            name = re.sub(r"^optimizer_weights/", "optimizer/", name)
            _put(out, name.removesuffix(":0"), tree.entries[path], where)
    return out


def _names(tree: Tree, group: str, attribute: str, where: str) -> list[str]:
    """A list of texts; long ones are split over ``<attribute>0``, ``<attribute>1`` and so on."""
    found = tree.attributes.get(group, {} if group == "optimizer_weights" else None)
    if found is None:
        raise CheckpointError(f"{where} lists the layer '{group}', but does not hold it. It is damaged.")
    parts = [found[attribute]] if attribute in found else []
    while attribute not in found and f"{attribute}{len(parts)}" in found:
        parts.append(found[f"{attribute}{len(parts)}"])
    names = [name for part in parts for name in _texts(part)]
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise CheckpointError(f"'{group}' in {where} has {attribute} that are no list of different names.")
    return names


def _texts(value: Any) -> list[Any]:
    """An attribute as a list; h5py writes an empty one as an array of no numbers."""
    return value if isinstance(value, list) else [] if getattr(value, "size", 1) == 0 else [value]


def _within(layer: str, name: str) -> str:
    """``"images/stem/kernel:0"`` of the layer ``stem`` is ``"kernel"``."""
    _, found, inner = f"/{name.removesuffix(':0')}".partition(f"/{layer}/")
    return inner if found else name.removesuffix(":0")


def _legacy_facts(root: Mapping[str, Any], where: str) -> dict[str, Any]:
    facts = {name: value for name, value in root.items() if isinstance(value, str)}
    for name in ("model_config", "training_config"):
        if name in facts:
            facts[name] = parse_json(facts[name].encode(), f"'{name}' of {where}")
    config = facts.pop("model_config", None)
    return facts if config is None else {"config": config, **facts}


# Keras 3: groups named after classes, a list of variables in each.


def _modern(tree: Tree, config: Any, where: str) -> dict[str, Entry]:
    titles = {path: facts["name"] for path, facts in tree.attributes.items() if isinstance(facts.get("name"), str)}
    names = Names(list(tree.entries), titles, config, where)
    found = sorted((*names.of(path), path) for path in tree.entries)
    out: dict[str, Entry] = {}
    for _, name, path in found:
        _put(out, name, tree.entries[path], where)
    return out


def _put(out: dict[str, Entry], name: str, entry: Entry, where: str) -> None:
    if name in out:
        raise CheckpointError(f"{where} holds two arrays that are called '{name}'. Expected each name once.")
    out[name] = entry
