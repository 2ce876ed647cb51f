"""Files of Keras, read without Keras: names, numbers, and files that do not fit together."""

import io
import json
import zipfile

import h5py
import numpy as np
import pytest

from transferjax._errors import CheckpointError
from transferjax.io import load, open
from transferjax.io._keras_names import variable_names

INSIDE = {
    "query_dense": "query", "key_dense": "key", "value_dense": "value", "output_dense": "attention_output",
    "forward_layer/cell": "forward_lstm/lstm_cell", "backward_layer/cell": "backward_lstm/lstm_cell",
    "each/layer": "each/dense", "gate/cell": "gate/gru_cell",
}  # fmt: skip
"""The file calls layers within layers by their attributes; Keras reports their own names."""


@pytest.fixture(scope="module")
def expected(kit):
    """What Keras itself reports, by model; seeds of random generators are not in the files."""
    out = {}
    with np.load(kit.fixtures / "keras/expected.npz") as file:
        for name in file:
            model, path = name.split(":")
            if "seed_generator" not in path:
                out.setdefault(model, {})[path] = file[name]
    return out


def _reported(name):
    for attribute, own in INSIDE.items():
        name = name.replace(attribute, own)
    return name


@pytest.mark.parametrize("model", ["images", "nested", "text", "half"])
def test_archives_hold_what_keras_reports_under_its_names(kit, expected, model):
    checkpoint = open(kit.fixtures / f"keras/{model}.keras")
    assert (checkpoint.format, checkpoint.verified) == ("keras", "verified")
    assert checkpoint.metadata["config"]["config"]["name"] == {"nested": "outer"}.get(model, model)
    assert checkpoint.metadata["keras"]["keras_version"].startswith("3.")
    assert {_reported(name) for name in checkpoint} == set(expected[model])
    for name in checkpoint:
        array = expected[model][_reported(name)]
        np.testing.assert_array_equal(checkpoint[name].astype(array.dtype), array)
        np.testing.assert_array_equal(
            checkpoint.read(name, (..., 0)) if array.ndim else 0, array[..., 0] if array.ndim else 0
        )


def test_bfloat16_keeps_its_dtype(kit):
    assert {str(s.dtype) for s in open(kit.fixtures / "keras/half.keras").shapes.values()} == {"bfloat16"}


@pytest.mark.parametrize("model", ["images", "nested"])
def test_older_whole_models(kit, expected, model):
    checkpoint = open(kit.fixtures / f"keras/{model}.h5")
    assert (checkpoint.format, checkpoint.verified) == ("keras-legacy", "unverified")
    assert (
        checkpoint.metadata["config"]["config"]["name"] == {"nested": "outer"}.get(model, model)
        and "optimizer_config" in checkpoint.metadata["training_config"]
    )
    layers = {name: array for name, array in expected[model].items() if not name.startswith("optimizer/")}
    assert [name for name in checkpoint if not name.startswith("optimizer/")] == list(layers)  # in the order of Keras
    assert all(np.array_equal(checkpoint[name], array) for name, array in layers.items())
    optimizer = [name for name in checkpoint if name.startswith("optimizer/")]
    for number, name in enumerate(optimizer):  # in the order of Keras too
        np.testing.assert_array_equal(checkpoint[name], expected[model][f"optimizer/vars/{number}"])
    assert optimizer[0] == f"optimizer/{'sgd' if model == 'images' else 'adam'}/iteration"


@pytest.mark.parametrize("model", ["images", "nested"])
def test_weights_alone_have_the_names_of_layers_that_they_carry(kit, expected, model):
    checkpoint = open(kit.fixtures / f"keras/{model}.weights.h5")
    assert checkpoint.format == "keras-weights" and len(checkpoint) == len(expected[model])
    unclear = {
        "last_norm/0": "last_norm/beta",
        "last_norm/1": "last_norm/moving_mean",
        "last_norm/2": "last_norm/moving_variance",
    }
    for name in checkpoint:
        np.testing.assert_array_equal(checkpoint[name], expected[model][unclear.get(name, name)])


def _rebuilt(kit, model, path, change):
    """The archive of a model with changed weights or configuration."""
    with zipfile.ZipFile(kit.fixtures / f"keras/{model}.keras") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    buffer = io.BytesIO(members["model.weights.h5"])
    config = json.loads(members["config.json"])
    with h5py.File(buffer, "r+") as file:
        members = change(file, config, members) or members
    members |= {"model.weights.h5": buffer.getvalue()} if "model.weights.h5" in members else {}
    members |= {"config.json": json.dumps(config).encode()} if "config.json" in members else {}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def _unnamed(file, config=None, members=None):
    groups = []
    file.visititems(lambda name, found: groups.append(found) if "name" in found.attrs else None)
    for group in groups:
        del group.attrs["name"]


@pytest.mark.parametrize("model", ["images", "nested", "text"])
def test_files_without_names_get_them_from_the_order_of_each_class(kit, tmp_path, model):
    """As Keras wrote them at first."""
    found = open(_rebuilt(kit, model, tmp_path / "m.keras", _unnamed))
    named = open(kit.fixtures / f"keras/{model}.keras")
    assert list(found) == list(named) and all(np.array_equal(found[name], named[name]) for name in found)


def test_weights_without_names_keep_those_of_the_file(kit, tmp_path):
    (tmp_path / "w.weights.h5").write_bytes((kit.fixtures / "keras/nested.weights.h5").read_bytes())
    with h5py.File(tmp_path / "w.weights.h5", "r+") as file:
        _unnamed(file)
    found = list(open(tmp_path / "w.weights.h5"))
    assert found[:6] == [
        "dense/kernel", "dense/bias", "functional/dense/kernel", "functional/dense/bias", "layer_normalization/gamma",
        "layer_normalization/beta",
    ]  # fmt: skip
    assert found[6:10] == [f"sequential/{name}/{end}" for name in ("dense", "dense_1") for end in ("kernel", "bias")]


def test_operations_between_layers_are_not_counted(kit, tmp_path):
    def change(file, config, members):
        _unnamed(file)
        config["config"]["layers"].insert(1, {"module": "keras.src.ops.numpy", "class_name": "Conv2D", "config": {}})

    assert next(iter(open(_rebuilt(kit, "images", tmp_path / "m.keras", change)))) == "stem/kernel"


NO_VARIABLE = "is not one of variables 0 to 1. It is damaged"
LACKING = {"weights": {"config.json": b""}, "configuration": {"model.weights.h5": b""}}
MISFITS = {
    "a layer is missing": (
        "images",
        lambda f, c, m: c["config"]["layers"].pop(1) and None,
        "called 'stem'.* is no layer",
    ),
    "a gap": ("images", lambda f, c, m: f.move("layers/dense/vars/1", "layers/dense/vars/7"), NO_VARIABLE),
    "no number": ("images", lambda f, c, m: f.move("layers/dense/vars/1", "layers/dense/vars/x"), NO_VARIABLE),
    "no weights": ("images", lambda f, c, m: LACKING["weights"], "has no member 'model.weights.h5'"),
    "no configuration": ("images", lambda f, c, m: LACKING["configuration"], "no member 'config.json', which a .keras"),
    "no arrays": ("half", lambda f, c, m: f.__delitem__("layers"), "holds no arrays"),
    "another class": (
        "nested",
        lambda f, c, m: f["layers/functional/vars"].attrs.update({"name": "inner"}),
        "\\(called 'inner'\\) is no layer of config.json, which has pixels, inner, branch, norm",
    ),
}


@pytest.mark.parametrize("what", MISFITS)
def test_weights_that_do_not_fit_their_configuration(kit, tmp_path, what):
    model, change, message = MISFITS[what]
    with pytest.raises(CheckpointError, match=message):
        open(_rebuilt(kit, model, tmp_path / "m.keras", change))


def test_two_layers_of_one_name(kit, tmp_path):
    def change(file):
        for group in ("layers/dense", "layers/layer_normalization"):
            file[f"{group}/vars"].attrs["name"] = "twin"
        file["layers/dense_2/vars/0"] = np.ones(1)
        file["layers/dense_2/vars"].attrs["name"] = "twin"

    (tmp_path / "w.weights.h5").write_bytes((kit.fixtures / "keras/nested.weights.h5").read_bytes())
    with h5py.File(tmp_path / "w.weights.h5", "r+") as file:
        change(file)
    with pytest.raises(
        CheckpointError, match=r"holds two arrays that are called 'twin/kernel'. Expected each name once"
    ):
        open(tmp_path / "w.weights.h5")


def test_a_huge_configuration(kit, monkeypatch):
    monkeypatch.setattr("transferjax.io._keras._LONGEST_CONFIG", 100)
    with pytest.raises(CheckpointError, match=r"'config.json' in .* bytes, more than any configuration"):
        open(kit.fixtures / "keras/half.keras")


def test_a_damaged_payload_is_noticed_when_it_is_read(kit, tmp_path):
    data = (kit.fixtures / "keras/images.keras").read_bytes()
    kernel = open(kit.fixtures / "keras/images.keras")["stem/kernel"].tobytes()
    at = data.index(kernel) + 5
    (tmp_path / "m.keras").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    checkpoint = open(tmp_path / "m.keras")  # only headers are read
    with pytest.raises(CheckpointError, match="its checksum does not match its bytes"):
        checkpoint.read("norm/gamma", slice(0, 1))


def test_a_compressed_archive(kit, tmp_path):
    with zipfile.ZipFile(kit.fixtures / "keras/images.keras") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "m.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    assert kit.same(kit.read_all(tmp_path / "m.keras"), kit.read_all(kit.fixtures / "keras/images.keras"))


def _legacy(path, layers, below="", suffix=":0"):
    """As TensorFlow's Keras writes: fixed-length names, ``:0`` behind each variable."""
    with h5py.File(path, "w") as file:
        root = file.create_group(below) if below else file
        root.attrs["layer_names"] = np.array([name.encode() for name in layers])
        for layer, variables in layers.items():
            group = root.create_group(layer)
            group.attrs["weight_names"] = np.array([f"{name}{suffix}".encode() for name in variables])
            for name, array in variables.items():
                group[f"{name}{suffix}"] = array
    return path


@pytest.mark.parametrize("below", ["", "model_weights"])
def test_files_of_tensorflow(tmp_path, below):
    layers = {
        "block1/conv": {"block1/conv/kernel": np.ones((3, 3, 1, 2)), "block1/conv/bias": np.zeros(2)},
        "flat": {},
        "dense_10": {"dense_10/kernel": np.ones((2, 2))},
        "dense_9": {"dense_9/kernel": np.zeros((2, 2))},
    }
    checkpoint = open(_legacy(tmp_path / "w.h5", layers, below))
    assert checkpoint.format == "keras-legacy"
    assert list(checkpoint) == ["block1/conv/kernel", "block1/conv/bias", "dense_10/kernel", "dense_9/kernel"]
    assert load(checkpoint)["dense_10"]["kernel"].tolist() == [[1, 1], [1, 1]]


def test_names_that_would_collide_stay_whole(tmp_path):
    layers = {"rnn": {"a/rnn/kernel": np.zeros(1), "b/rnn/kernel": np.ones(1)}}
    checkpoint = open(_legacy(tmp_path / "w.h5", layers))
    assert list(checkpoint) == ["rnn/a/rnn/kernel:0", "rnn/b/rnn/kernel:0"] and checkpoint["rnn/b/rnn/kernel:0"] == 1


def test_long_lists_of_names_are_split(tmp_path):
    path = _legacy(tmp_path / "w.h5", {"a": {"a/kernel": np.ones(1)}, "b": {"b/kernel": np.ones(1)}})
    with h5py.File(path, "r+") as file:
        del file.attrs["layer_names"]
        file["a"].attrs["weight_names0"] = file["a"].attrs.pop("weight_names")
        file.attrs["layer_names0"], file.attrs["layer_names1"] = np.array([b"b"]), np.array([b"a"])
    assert list(open(path)) == ["b/kernel", "a/kernel"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.__delitem__("b"), "lists the layer 'b', but does not hold it"),
        (lambda f: f.__delitem__("b/b/kernel:0"), "lists the weight 'b/b/kernel:0', but does not hold it"),
        (lambda f: f.attrs.update({"layer_names": np.array([b"b", b"b"])}), "that are no list of different names"),
        (lambda f: f.attrs.update({"layer_names": np.ones(2)}), "that are no list of different names"),
        (lambda f: f.attrs.update({"layer_names": 3.0}), "that are no list of different names"),
        (lambda f: f.attrs.update({"layer_names": "ab"}), "lists the layer 'ab', but does not hold it"),
        (lambda f: f.attrs.update({"model_config": "{"}), "'model_config' of .* is damaged: it is no JSON"),
    ],
)  # fmt: skip
def test_lists_that_lie(tmp_path, change, message):
    path = _legacy(tmp_path / "w.h5", {"a": {"a/kernel": np.ones(1)}, "b": {"b/kernel": np.ones(1)}})
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(CheckpointError, match=message):
        open(path)


@pytest.mark.parametrize(
    ("kind", "config", "count", "names"),
    [
        ("conv2d", {}, 2, "kernel bias"), ("conv2d", {"use_bias": False}, 1, "kernel"), ("conv2d", {}, 3, "0 1 2"),
        ("conv2d_transpose", {}, 2, "kernel bias"), ("separable_conv2d", {}, 2, "depthwise_kernel pointwise_kernel"),
        ("batch_normalization", {"center": False, "scale": False}, 2, "moving_mean moving_variance"),
        ("batch_normalization", {"center": False}, 3, "gamma moving_mean moving_variance"),
        ("layer_normalization", {}, 1, "0"), ("lstm_cell", {}, 2, "kernel recurrent_kernel"),
        ("my_own_layer", {}, 2, "0 1"), ("embedding", {}, 1, "embeddings"),
    ],
)  # fmt: skip
def test_names_of_variables(kind, config, count, names):
    assert " ".join(variable_names(kind, config, count)) == names
