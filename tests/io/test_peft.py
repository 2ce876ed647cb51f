"""Adapter folders: those of PEFT give its outputs here, and those written here hold what PEFT writes."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax import interop, models, surgery
from transferjax._errors import CheckpointError, SelectionError
from transferjax.models import _bert, _initialise

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures"
TINY = _bert.Variant(layers=2, width=8, heads=2, hidden=12, vocabulary=20, positions=10, types=3)
QUERY = "layers/*/attention/query/kernel"


@pytest.fixture(scope="module")
def tiny():
    """The tiny BERT, the plan of its weights, and inputs."""
    with np.load(FIXTURES / "bert" / "tiny.npz") as file:
        stored = dict(file)
    weights = {name.removeprefix("weights/"): array for name, array in stored.items() if name.startswith("weights/")}
    model = interop.nnx(_initialise.materialise(lambda: _bert.build(TINY, 0), jax.random.key(0), _bert.std, "head/"))
    plan = surgery.plan(weights, model, *models.rules("bert_base"))
    model = surgery.assemble(model, {path: jnp.asarray(leaf) for path, leaf in plan.apply(weights).items()})
    return model, plan, {name: stored[name] for name in ("input_ids", "attention_mask", "token_type_ids")}


@pytest.fixture
def folder(tmp_path):
    """A copy of the plain adapter of PEFT."""
    return pathlib.Path(shutil.copytree(FIXTURES / "peft" / "plain", tmp_path / "adapter"))


def trained(model, tuning):
    """Weights of a tuning as they could be after training."""
    trainable, _ = tuning.init(jax.random.key(0), model.params)
    leaves, treedef = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(treedef, [x + jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def edit(folder, **options):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))


@pytest.mark.parametrize("name", ["plain", "patterns", "dora"])
def test_a_folder_of_peft_gives_its_outputs(tiny, name):
    model, plan, inputs = tiny
    with np.load(FIXTURES / "peft" / "outputs.npz") as file:
        expected = {what: file[f"{name}/{what}"] for what in ("hidden", "pooled")}
    adapter = tj.io.read_peft(FIXTURES / "peft" / name, model, plan)
    params = adapter.tuning.merge(adapter.trainable, adapter.frozen)
    outputs, _ = model.apply(params, model.extra, inputs)
    kept = inputs["attention_mask"] != 0
    np.testing.assert_allclose(outputs["last_hidden_state"][kept], expected["hidden"][kept], atol=3e-5)
    np.testing.assert_allclose(outputs["pooled"], expected["pooled"], atol=3e-5)
    plain, _ = model.apply(model.params, model.extra, inputs)
    assert not np.allclose(plain["last_hidden_state"][kept], expected["hidden"][kept], atol=1e-2)


@pytest.mark.parametrize("rho", [1, 2])
def test_eva_begins_with_the_ranks_and_directions_of_peft(tiny, rho):
    model, plan, inputs = tiny
    with np.load(FIXTURES / "peft" / "eva.npz") as file:
        theirs = {name.partition("/")[2]: file[name] for name in file if name.startswith(f"{rho}/")}
    kernels = "layers/*/{attention/{query,out},mlp/down}/kernel"
    activations = tj.tuning.input_moments(model, kernels, [{"inputs": inputs}])
    trainable, _ = tj.tuning.eva(kernels, 2, activations, rho=rho).init(jax.random.key(0), model.params)
    sources = {move.target: move.source.removesuffix(".weight") for move in plan.moves}
    found = {path.removesuffix("/lora_a"): leaf for path, leaf in tj.paths(trainable).items() if "lora_a" in path}
    ours = {sources[path]: np.asarray(leaf).T for path, leaf in found.items()}
    assert len(ours) == 6
    assert {name: len(a) for name, a in ours.items()} == {name: len(a) for name, a in theirs.items()}
    for name, a in ours.items():
        np.testing.assert_allclose(a, theirs[name], atol=2e-3)


@pytest.mark.parametrize("name", ["plain", "patterns", "dora"])
def test_what_is_written_is_what_peft_writes(tiny, tmp_path, name):
    model, plan, _ = tiny
    theirs = FIXTURES / "peft" / name
    adapter = tj.io.read_peft(theirs, model, plan)
    alpha = {path: alpha for path, _, _, alpha in adapter.report.rows if alpha is not None}
    tj.io.write_peft(tmp_path / "a", adapter.trainable, plan, alpha=alpha, rank_stabilised=name == "patterns")
    file = "adapter_model.safetensors"
    ours, stored = tj.io.open(tmp_path / "a" / file), tj.io.open(theirs / file)
    assert set(ours) == set(stored)
    for key in stored:
        np.testing.assert_array_equal(ours[key], stored[key])
    config, wanted = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path / "a", theirs))
    for key in ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "bias", "fan_in_fan_out"):
        assert config[key] == wanted[key], key
    ends = lambda names, ends: all(any(n.endswith(end) for end in ends) for n in names)
    assert ends(config["target_modules"], wanted["target_modules"])
    assert sorted(config["rank_pattern"].values()) == sorted(wanted["rank_pattern"].values())
    assert sorted(config["alpha_pattern"].values()) == sorted(wanted["alpha_pattern"].values())
    again = tj.io.read_peft(tmp_path / "a", model, plan)
    for one, two in zip(jax.tree.leaves(again.trainable), jax.tree.leaves(adapter.trainable), strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_convolution_and_a_chain_come_back(tmp_path):
    params = {"conv": {"kernel": jnp.ones((3, 3, 4, 6))}, "fc": {"kernel": jnp.ones((6, 2)), "bias": jnp.ones(2)}}
    ones = lambda *shape: np.ones(shape, np.float32)
    source = {"conv.weight": ones(6, 4, 3, 3), "fc.weight": ones(2, 6), "fc.bias": ones(2)}
    plan = surgery.plan(
        source,
        params,
        surgery.rename("conv.weight", "conv/kernel"),
        surgery.rename("fc.weight", "fc/kernel"),
        surgery.rename("fc.bias", "fc/bias"),
        surgery.permute("conv/kernel", (2, 3, 1, 0)),
        surgery.permute("fc/kernel", (1, 0)),
    )
    model = interop.pure(lambda params, x: x, params)
    tuning = tj.chain(lora=tj.lora("conv/kernel", rank=2), head=tj.train("fc/**"))
    trainable = trained(model, tuning)
    report = tj.io.write_peft(tmp_path / "a", trainable, plan, prefix="net.", base="somewhere/base")
    assert ("conv/kernel", "net.conv", 2, 2.0) in report.rows
    stored = tj.io.open(tmp_path / "a" / "adapter_model.safetensors")
    assert stored.shapes["base_model.model.net.conv.lora_A.weight"].shape == (2, 4, 3, 3)
    assert stored.shapes["base_model.model.net.fc.weight"].shape == (2, 6)
    adapter = tj.io.read_peft(tmp_path / "a", model, plan)
    merged = adapter.tuning.merge(adapter.trainable, adapter.frozen)
    wanted = tuning.merge(trainable, tuning.init(jax.random.key(0), params)[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), merged, wanted)
    assert adapter.report.metadata["base"] == "somewhere/base"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'. Expected 'LORA'"),
        ({"use_qalora": True}, "uses 'use_qalora', which is not read here"),
        ({"use_dora": True}, "has lora_a, lora_b as the adapter of .* and lora_magnitude_vector, as use_dora says"),
        ({"bias": "all"}, "has bias 'all': biases were trained too. Expected 'none'"),
    ],
)
def test_what_is_not_read_is_named(tiny, folder, options, message):
    model, plan, _ = tiny
    edit(folder, **options)
    with pytest.raises(CheckpointError, match=message):
        tj.io.read_peft(folder, model, plan)


def rewrite(folder, change):
    file = folder / "adapter_model.safetensors"
    arrays = dict(tj.io.open(file).items())
    change(arrays)
    file.unlink()
    tj.io.save(file, arrays)


def drop(arrays, part):
    for name in [name for name in arrays if part in name]:
        del arrays[name]


def put(name, array):
    return lambda arrays: arrays.update({f"base_model.model.{name}": np.asarray(array, np.float32)})


def only_a_bias(arrays):
    drop(arrays, "lora")
    put("pooler.dense.bias", np.zeros(8))(arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: drop(a, "0.attention.self.query.lora_B"), "has lora_a as the adapter of 'encoder.layer.0"),
        (only_a_bias, "holds no lora_A and lora_B"),
        (put("encoder.layer.7.x.lora_A.weight", np.ones((2, 8))), "names no leaves"),
        (put("pooler.dense.lora_B.bias", np.ones(8)), "array of LoRA that is not read"),
        (put("encoder.layer.0.attention.self.query.lora_magnitude_vector", np.ones(8)), "as use_dora is not set"),
        (put("encoder.layer.0.attention.self.key.lora_A.weight", np.ones(8)), "Expected two axes"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(tiny, folder, change, message):
    model, plan, _ = tiny
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        tj.io.read_peft(folder, model, plan)


def test_an_adapter_of_another_size_is_refused(tiny, folder):
    model, plan, _ = tiny

    def widen(arrays):
        for name in arrays:
            if "lora_A" in name:
                arrays[name] = np.ones((2, 16), np.float32)

    rewrite(folder, widen)
    with pytest.raises(CheckpointError, match="for another size of the model"):
        tj.io.read_peft(folder, model, plan)


def test_a_folder_that_is_no_adapter_is_refused(tiny, folder):
    model, plan, _ = tiny
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"but no adapter_model\.safetensors"):
        tj.io.read_peft(folder, model, plan)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"is no PEFT adapter: cannot read adapter_config\.json"):
        tj.io.read_peft(folder, model, plan)


def test_nothing_is_overwritten_unless_it_is_an_adapter(tiny, folder, tmp_path):
    model, plan, _ = tiny
    weights = trained(model, tj.lora(QUERY, rank=1))
    with pytest.raises(CheckpointError, match="exists, and is left as it is"):
        tj.io.write_peft(folder, weights, plan)
    tj.io.write_peft(folder, weights, plan, overwrite=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is no PEFT adapter, and is left as it is"):
        tj.io.write_peft(folder, weights, plan, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"


def test_dora_on_a_convolution_comes_back(tmp_path):
    params = {"conv": {"kernel": jax.random.normal(jax.random.key(2), (3, 3, 4, 6)), "bias": jnp.ones(6)}}
    plan = surgery.plan(
        {"conv.weight": np.ones((6, 4, 3, 3), np.float32), "conv.bias": np.ones(6, np.float32)},
        params,
        surgery.rename("conv.weight", "conv/kernel"),
        surgery.rename("conv.bias", "conv/bias"),
        surgery.permute("conv/kernel", (2, 3, 1, 0)),
    )
    model, tuning = interop.pure(lambda params, x: x, params), tj.dora("conv/kernel", 2, alpha=3.0)
    trainable = trained(model, tuning)
    tj.io.write_peft(tmp_path / "a", {"group": trainable}, plan, alpha=3.0)
    stored = tj.io.open(tmp_path / "a" / "adapter_model.safetensors")
    assert stored.shapes["base_model.model.conv.lora_magnitude_vector"].shape == (1, 6, 1, 1)
    adapter = tj.io.read_peft(tmp_path / "a", model, plan)
    assert adapter.report.metadata["DoRA"] is True
    merged = adapter.tuning.merge(adapter.trainable, adapter.frozen)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), merged, tuning.merge(trainable, params))


def test_what_has_no_form_in_peft_is_named(tiny, tmp_path):
    model, plan, _ = tiny
    write = lambda trainable, plan=plan, **options: tj.io.write_peft(tmp_path / "a", trainable, plan, **options)
    with pytest.raises(CheckpointError, match="found no lora_a and lora_b"):
        write(tj.train(QUERY).init(jax.random.key(0), model.params)[0])
    with pytest.raises(CheckpointError, match="'heads/kernel/lora_a' has no counterpart in the plan"):
        write({"heads": {"kernel": {"lora_a": jnp.ones((2, 1)), "lora_b": jnp.ones((1, 2))}}})
    with pytest.raises(SelectionError, match="alpha has no entry for 'layers/0/attention/query/kernel'"):
        write(trained(model, tj.lora(QUERY, rank=1)), alpha={"layers/0/attention/key/kernel": 1.0})
    mixed = tj.chain(a=tj.lora(QUERY, rank=1), b=tj.dora("layers/*/attention/key/kernel", rank=1))
    with pytest.raises(CheckpointError, match=r"/key/kernel' has a magnitude \(DoRA\) and .* PEFT has one use_dora"):
        write(trained(model, mixed))
    with pytest.raises(CheckpointError, match=r"the adapter of 'pooler/kernel' has only magnitude\. Expected lora_a"):
        write({"pooler": {"kernel": {"magnitude": jnp.ones(8)}}})
    params = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4)), "c": jnp.ones((4, 4)), "d": jnp.ones((4, 4))}
    other = surgery.plan(
        {name: np.ones((4, 4), np.float32) for name in ("a.weight", "b.weight", "c.table")},
        params,
        surgery.rename("a.weight", "a"),
        surgery.rename("b.weight", "b"),
        surgery.rename("c.table", "c"),
        surgery.permute("b", (1, 0)),
        surgery.fresh("d"),
    )
    weights = lambda names: tj.lora(names, rank=1).init(jax.random.key(0), params)[0]
    with pytest.raises(CheckpointError, match="PEFT has one fan_in_fan_out for all"):
        write(weights("{a,b}"), other)
    with pytest.raises(CheckpointError, match=r"'c' comes from 'c\.table'\. Expected a module's '\.weight'"):
        write(weights("c"), other)
    with pytest.raises(CheckpointError, match="'d' comes from no single source leaf"):
        write(weights("d"), other)
    turned = surgery.plan(
        {"a.weight": np.ones((2, 8), np.float32)}, {"a": jnp.ones((4, 4))}, surgery.rename("a.weight", "a"),
        surgery.reshape("a", (4, 4)),
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="the adapter of 'a' has no form in PEFT"):
        write({"a": {"lora_a": jnp.ones((4, 1)), "lora_b": jnp.ones((1, 4))}}, turned)
    assert not (tmp_path / "a").exists()
