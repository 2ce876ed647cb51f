"""align finds, from names and shapes, what the hand-written rules of models say, and refuses to guess."""

import dataclasses
import itertools
import json
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transferjax import interop, surgery
from transferjax._errors import PlanError
from transferjax.models import (
    _bert,
    _bert_rules,
    _efficientnet_lite,
    _llama,
    _llama_rules,
    _resnet,
    _resnet_rules,
    _torch_rules,
    _vit,
    _vit_rules,
)
from transferjax.surgery import align
from transferjax.surgery._align_assign import assign
from transferjax.surgery._align_patterns import cover, patterns
from transferjax.tree import nest, regex

TABLES = Path(__file__).parents[1] / "fixtures" / "align"
TORCH = {2: (1, 0), 4: (2, 3, 1, 0)}
NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
DENSE = {"weight": "kernel", "bias": "bias"}


def leaf(shape, dtype="float32"):
    return jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype))


def table(name):
    """``{name: ShapeDtypeStruct}`` of a published checkpoint, in the order of its file."""
    return {row[0]: leaf(*row[1:]) for row in json.loads((TABLES / f"{name}.json").read_text())}


def abstract(build, *arguments):
    return interop.nnx(nnx.eval_shape(lambda: build(*arguments)))


def readable(rules):
    """Whether the rules, printed and read by Python again, are the same: they can be committed."""
    return eval(f"({', '.join(map(repr, rules))},)", {**vars(surgery), "regex": regex}) == rules


# What is found, against the hand-written rules of the zoo.

VIT = dataclasses.replace(_vit.VARIANTS["vit_tiny_patch16_224"], width=128, depth=2, heads=2)
LLAMA = _llama.Variant(layers=3, width=32, heads=4, kv_heads=2, hidden=48, vocabulary=100, positions=64)
LITE = (_efficientnet_lite, _torch_rules.efficientnet_lite, 1000)
CLASSES = (1000, 10, 0), (1000,)
ZOO = {
    **{
        f"efficientnet_lite{n}": (*LITE, CLASSES[n > 0], _efficientnet_lite.VARIANTS[f"efficientnet_lite{n}"])
        for n in range(3)
    },
    "minilm_l6": (_bert, _bert_rules.huggingface, 0, (0, 7), _bert.VARIANTS["minilm_l6"]),
    "vit_tiny": (_vit, _vit_rules.timm, 1000, (1000, 10, 0), _vit.VARIANTS["vit_tiny_patch16_224"]),
    "vit_huggingface": (_vit, _vit_rules.huggingface, 2, (2, 10, 0), VIT),
    "resnet18": (_resnet, _resnet_rules.torch, 1000, (1000, 10, 0), _resnet.VARIANTS["resnet18"]),
    "resnet50": (_resnet, _resnet_rules.torch, 1000, (1000, 10, 0), _resnet.VARIANTS["resnet50"]),
    "llama_tiny": (_llama, _llama_rules.huggingface, 0, (0, 7), LLAMA),
}
CASES = [(name, classes) for name, case in ZOO.items() for classes in case[3]]


def hand_written(name, classes, **changes):
    """The names of a file, a model of the zoo for it, and the rules that the zoo has."""
    module, rules, file_classes, _, variant = ZOO[name]
    variant = dataclasses.replace(variant, **changes) if changes else variant
    return table(name), abstract(module.build, variant, classes, None), rules(variant, file_classes, classes)


def same_plan(source, target, rules, expected):
    found, wanted = surgery.plan(source, target, *rules), surgery.plan(source, target, *expected)
    assert found.moves == wanted.moves
    assert found.waived == wanted.waived


@pytest.mark.parametrize(("name", "classes"), CASES)
def test_the_rules_found_make_the_moves_of_the_rules_written_by_hand(name, classes):
    source, target, expected = hand_written(name, classes)
    rules, report = align(source, target)
    same_plan(source, target, rules, expected)
    assert readable(rules)
    assert report.column("rule") == [repr(rule) for rule in rules]
    assert sum(report.column("confidence")) > 0.5 * len(rules)


@pytest.mark.parametrize("changes", [{"scanned": True}, {"tied": True}, {"scanned": True, "tied": True}])
def test_a_decoder_with_scanned_layers_or_a_tied_embedding(changes):
    source, target, expected = hand_written("llama_tiny", 0, **changes)
    rules, _ = align(source, target)
    same_plan(source, target, rules, expected)
    assert readable(rules)
    layer = r"model\.layers\.(?P<i>\d+)\.self_attn\.q_proj\.weight"
    assert (surgery.stack(layer, "layers/attention/query/kernel") in rules) == ("scanned" in changes)


@pytest.mark.parametrize("name", ["resnet18", "vit_huggingface", "minilm_l6", "llama_tiny"])
def test_names_and_targets_in_another_order_give_the_same_rules(name):
    """Sorted names, as safetensors writes them, say nothing by their order."""
    source, target, _ = hand_written(name, 0)
    back = {path: leaf(one.shape) for path, one in reversed(surgery.leaves(target).items())}
    assert align(dict(sorted(source.items())), target)[0] == align(dict(reversed(sorted(source.items()))), back)[0]


def test_the_report_says_why_and_how_sure():
    source, target, _ = hand_written("minilm_l6", 0)
    _, report = align(source, target)
    layout = "(out, in) as in torch: 12 kernels fit in no other layout; 25 square kernels follow them"
    assert report.metadata == {"layout": layout, "blocks": "encoder.layer.# -> layers/# (6)"}
    rows = {row[0]: row[1:] for row in report.rows}
    pattern = r"encoder\.layer\.(\d+)\.attention\.self\.(key|query|value)\.weight"
    assert rows[repr(surgery.rename(pattern, r"layers/\1/attention/\2/kernel"))] == (18, "names", 1.0)
    assert rows["waive('*.position_ids')"] == (1, "counter or buffer (int64)", 1.0)


def test_another_number_of_classes_is_told_as_fresh_and_goes_back_under_the_old_name():
    source, target, _ = hand_written("efficientnet_lite0", 10)
    rules, report = align(source, target)
    why = "last layer of 1,000 outputs in the file and 10 in the target"
    told = [row for row in report.rows if row[2] == why]
    assert told == [
        (r"rename(r'_fc\.bias', 'head/fc/bias')", 1, why, 1.0),
        (r"rename(r'_fc\.weight', 'head/fc/kernel')", 1, why, 1.0),
        ("fresh('head/fc/**')", 2, why, 1.0),
    ]
    made = surgery.plan(source, target, *rules)
    assert made.counts()["fresh"] == 2 and {"_fc.weight", "_fc.bias"} < set(made.waived)
    assert made.replaced == (
        surgery.Move("head/fc/bias", "_fc.bias"),
        surgery.Move("head/fc/kernel", "_fc.weight", (("permute", (1, 0)),)),
    )
    back = made.inverse().shapes
    assert back["_fc.weight"].shape == (10, 1280) and back["_fc.bias"].shape == (10,)


def test_numbers_that_change_on_the_way_are_written_out():
    source, target, _ = hand_written("resnet18", 1000)
    rules, report = align(source, target)
    assert surgery.rename(r"layer2\.(\d+)\.conv(\d+)\.weight", r"stages/1/\1/conv\2/kernel") in rules
    assert report.metadata["blocks"] == "layer#.# -> stages/#/# (8)"


# What is found in files of other networks, against pairs written down here: {path: (source, (shape, operations))}.


def torch(shape, *reshaped):
    """Shape and operations of a kernel of a torch file, reshaped at last if a shape is given."""
    axes = TORCH[len(shape)]
    turned = tuple(shape[a] for a in axes)
    ops = (("permute", axes),)
    return (reshaped[0], (*ops, ("reshape", reshaped[0]))) if reshaped else (turned, ops)


def plain(shape, *reshaped):
    """Shape and operations of a leaf that keeps its axes."""
    return (reshaped[0], (("reshape", reshaped[0]),)) if reshaped else (tuple(shape), ())


def layer(leaf_name, spec):
    """What becomes of a weight or bias of a dense layer or convolution."""
    return torch(spec.shape) if leaf_name == "weight" else plain(spec.shape)


def target_of(expected):
    return nest({path: leaf(shape) for path, (_, (shape, _)) in expected.items()})


def check(source, expected, waived=(), rules=()):
    """Aligns with a target of the expected leaves, and compares every move."""
    target = target_of(expected)
    rules, report = align(source, target, rules=rules)
    made = surgery.plan(source, target, *rules)
    assert {move.target: (move.source, move.ops) for move in made.moves} == {
        path: (name, ops) for path, (name, (_, ops)) in expected.items()
    }
    assert set(made.waived) == set(waived)
    assert readable(rules)
    return rules, report


def bert(source, width, heads):
    """The paths of a BERT in Flax whose attention kernels are cut into heads."""
    modules = {
        "attention.self.query": "attention/query",
        "attention.self.key": "attention/key",
        "attention.self.value": "attention/value",
        "attention.output.dense": "attention/out",
        "attention.output.LayerNorm": "attention_norm",
        "intermediate.dense": "mlp/up",
        "output.dense": "mlp/down",
        "output.LayerNorm": "mlp_norm",
    }
    cut = (heads, width // heads)
    out = {}
    for name, spec in source.items():
        found = re.fullmatch(r"bert\.encoder\.layer\.(\d+)\.(.*)\.(weight|bias)", name)
        table_ = re.fullmatch(r"bert\.embeddings\.(\w+)_embeddings\.weight", name)
        last = name.split(".")[-1]
        if found:
            path = f"layers/{found[1]}/{modules[found[2]]}"
            if path.endswith("norm"):
                out[f"{path}/{NORM[last]}"] = name, plain(spec.shape)
            elif re.search("query|key|value", path):
                way = torch(spec.shape, (width, *cut)) if last == "weight" else plain(spec.shape, cut)
                out[f"{path}/{DENSE[last]}"] = name, way
            elif path.endswith("out") and last == "weight":
                out[f"{path}/kernel"] = name, torch(spec.shape, (*cut, width))
            else:
                out[f"{path}/{DENSE[last]}"] = name, layer(last, spec)
        elif table_:
            out[f"embeddings/{table_[1]}/embedding"] = name, plain(spec.shape)
        elif name.startswith("bert.embeddings.LayerNorm"):
            out[f"embeddings/norm/{NORM[last]}"] = name, plain(spec.shape)
    return out


def test_bert_with_a_language_model_head_that_the_target_lacks():
    source = table("bert_tiny")
    head = [name for name in source if name.startswith("cls.")]
    rules, report = check(source, bert(source, 128, 2), head)
    assert surgery.waive("cls.predictions.*") in rules
    assert "last layer that the target does not have" in report.column("evidence")


def test_a_target_with_a_last_layer_that_the_file_does_not_have():
    source = {name: one for name, one in table("bert_tiny").items() if not name.startswith("cls.")}
    target = target_of(bert(source, 128, 2)) | {"head": {"kernel": leaf((128, 7)), "bias": leaf((7,))}}
    rules, report = align(source, target)
    assert (repr(surgery.fresh("head/**")), 2, "last layer that the file does not have", 1.0) in report.rows
    assert surgery.plan(source, target, *rules).counts()["fresh"] == 2


def vit(source, width, heads):
    """The paths of a ViT in Flax, from timm's: qkv is cut into three, and each into heads."""
    modules = {
        "norm1": "norm1",
        "norm2": "norm2",
        "attn.proj": "attention/out",
        "mlp.fc1": "mlp/up",
        "mlp.fc2": "mlp/down",
    }
    cut = (heads, width // heads)
    out = {
        "class_token": ("cls_token", plain((1, 1, width))),
        "position": ("pos_embed", plain((1, 197, width))),
    }
    for name, spec in source.items():
        found = re.fullmatch(r"blocks\.(\d+)\.(.*)\.(weight|bias)", name)
        last = name.split(".")[-1]
        if found and found[2] == "attn.qkv":
            for n, part in enumerate(("query", "key", "value")):
                piece = ("slice", 0, n * width, (n + 1) * width)
                turn = (("permute", (1, 0)), ("reshape", (width, *cut))) if last == "weight" else (("reshape", cut),)
                shape = (width, *cut) if last == "weight" else cut
                out[f"blocks/{found[1]}/attention/{part}/{DENSE[last]}"] = name, (shape, (piece, *turn))
        elif found and found[2] == "attn.proj" and last == "weight":
            out[f"blocks/{found[1]}/attention/out/kernel"] = name, torch(spec.shape, (*cut, width))
        elif found:
            leaves = NORM if "norm" in found[2] else DENSE
            way = plain(spec.shape) if "norm" in found[2] else layer(last, spec)
            out[f"blocks/{found[1]}/{modules[found[2]]}/{leaves[last]}"] = name, way
        elif name.startswith("patch_embed"):
            out[f"patch/{DENSE[last]}"] = name, layer(last, spec)
        elif name.startswith("norm."):
            out[f"norm/{NORM[last]}"] = name, plain(spec.shape)
        elif name.startswith("head."):
            out[f"head/{DENSE[last]}"] = name, layer(last, spec)
    return out


def test_fused_query_key_value_is_cut_and_each_part_is_cut_into_heads():
    source = table("vit_tiny")
    rules, report = check(source, vit(source, 192, 3))
    parts = tuple(rf"blocks/\1/attention/{part}/kernel" for part in ("query", "key", "value"))
    assert surgery.split(r"blocks\.(\d+)\.attn\.qkv\.weight", parts, axis=0) in rules
    assert surgery.reshape("blocks/*/attention/{query,key,value}/kernel", (192, 3, 64)) in rules
    assert "names: qkv is query, key, value" in report.column("evidence")


def test_vit_whose_norms_have_other_names():
    """norm1 and norm2 share no number with attention_norm and mlp_norm: the usual order decides."""
    source = table("vit_tiny")
    names = {"norm1": "attention_norm", "norm2": "mlp_norm"}
    turned = lambda path: re.sub(r"(?<=/)norm[12](?=/)", lambda m: names[m[0]], path)
    _, report = check(source, {turned(path): row for path, row in vit(source, 192, 3).items()})
    assert "order" in report.column("evidence")


def test_another_size_of_the_position_table_is_refused_and_settled_by_adapt():
    source = table("vit_tiny")
    expected = vit(source, 192, 3)
    target = target_of(expected) | {"position": leaf((1, 577, 192))}
    with pytest.raises(
        PlanError, match=r"Write rename\('pos_embed', 'position'\) with adapt\('position', \.\.\.\) or fr"
    ):
        align(source, target)
    known = (surgery.rename("pos_embed", "position"), surgery.adapt("position", "position_embedding"))
    rules, report = align(source, target, rules=known)
    moves = {move.target: move for move in surgery.plan(source, target, *rules).moves}
    assert moves.pop("position").ops[0][0] == "resize_position_embedding"
    assert {path: (move.source, move.ops) for path, move in moves.items()} == {
        path: (name, ops) for path, (name, (_, ops)) in expected.items() if path != "position"
    }
    assert report.rows[0] == ("rename('pos_embed', 'position')", None, "given", 1.0)


@pytest.mark.parametrize("fused", [False, True])
def test_gpt2_keeps_its_kernels_as_in_flax(fused):
    """Its kernels are (in, out): the layout is found to be that of the target."""
    source = table("gpt2")
    modules = {
        "ln_1": "norm1",
        "ln_2": "norm2",
        "attn.c_attn": "attention/qkv",
        "attn.c_proj": "attention/out",
        "mlp.c_fc": "mlp/up",
        "mlp.c_proj": "mlp/down",
    }
    out = {
        "embed/embedding": ("wte.weight", plain((50257, 768))),
        "position/embedding": ("wpe.weight", plain((1024, 768))),
    }
    for name, spec in source.items():
        found, last = re.fullmatch(r"h\.(\d+)\.(.*)\.(weight|bias)", name), name.split(".")[-1]
        if found and found[2] == "attn.c_attn" and not fused:
            axis = len(spec.shape) - 1
            for n, part in enumerate(("query", "key", "value")):
                way = ((*spec.shape[:-1], 768), (("slice", axis, 768 * n, 768 * (n + 1)),))
                out[f"blocks/{found[1]}/attention/{part}/{DENSE[last]}"] = name, way
        elif found:
            path = f"blocks/{found[1]}/{modules[found[2]]}"
            out[f"{path}/{(NORM if 'norm' in path else DENSE)[last]}"] = name, plain(spec.shape)
        elif name.startswith("ln_f"):
            out[f"norm/{NORM[last]}"] = name, plain(spec.shape)
    _, report = check(source, out)
    forced = 9 if fused else 6
    assert report.metadata["layout"] == (
        f"axes as in the target: {forced} kernels fit in no other layout; 3 square kernels follow them"
    )


def test_a_vgg_whose_modules_are_only_numbered():
    source, out = table("vgg11"), {}
    numbers = sorted({int(name.split(".")[1]) for name in source if name.startswith("features")})
    for name, spec in source.items():
        first, module, last = name.split(".")
        path = (
            f"conv{numbers.index(int(module))}" if first == "features" else module.replace("fc", "head", module == "fc")
        )
        out[f"{path}/{DENSE[last]}"] = name, layer(last, spec)
    check(source, out)


def test_a_convnext_with_scales_and_downsampling_between_its_stages():
    source, out = table("convnext_atto"), {}
    parts = {"0": "norm", "1": "conv"}
    for name, spec in source.items():
        block, last = re.match(r"stages\.(\d)\.blocks\.(\d+)\.", name), name.split(".")[-1]
        path = f"stages/{block[1]}/blocks/{block[2]}/" if block else ""
        if last == "gamma":
            out[f"{path}gamma"] = name, plain(spec.shape)
        elif ".mlp." in name:
            way = torch(spec.shape, spec.shape[1::-1]) if last == "weight" else plain(spec.shape)
            out[f"{path}mlp/{'up' if 'fc1' in name else 'down'}/{DENSE[last]}"] = name, way
        elif block:
            norm = ".norm." in name
            out[f"{path}norm/{NORM[last]}" if norm else f"{path}depthwise/{DENSE[last]}"] = (
                name,
                plain(spec.shape) if norm else layer(last, spec),
            )
        else:
            *before, module, _ = name.split(".")
            path = "/".join((*before, parts.get(module, module)))
            if path == "stem/norm":
                path = "stem/conv"
            elif path == "stem/conv":
                path = "stem/norm"
            norm = path.endswith("norm")
            out[f"{path}/{(NORM if norm else DENSE)[last]}"] = name, plain(spec.shape) if norm else layer(last, spec)
    _, report = check(source, out)
    assert report.metadata["blocks"] == "stages.#.blocks.# -> stages/#/blocks/# (12), stages.# -> stages/# (3)"


def mobilenet(source):
    """The paths of a MobileNetV2 in Flax; in the file, the first block's names mean other layers than the others'."""
    first = {"conv_dw": "depthwise", "conv_pw": "project", "bn1": "depthwise_bn", "bn2": "project_bn"}
    later = {"conv_pw": "expand", "conv_dw": "depthwise", "conv_pwl": "project"}
    later |= {"bn1": "expand_bn", "bn2": "depthwise_bn", "bn3": "project_bn"}
    ends = {
        "conv_stem": "stem/conv",
        "bn1": "stem/bn",
        "conv_head": "head/conv",
        "bn2": "head/bn",
        "classifier": "head/fc",
    }
    blocks = list(dict.fromkeys(found[0] for name in source if (found := re.match(r"blocks\.\d\.\d", name))))
    out = {}
    for name, spec in source.items():
        *block, module, last = name.split(".")
        if last == "num_batches_tracked":
            continue
        number = blocks.index(".".join(block)) if block else -1
        path = f"blocks/{number}/{(later if number else first)[module]}" if block else ends[module]
        norm = path.endswith("bn")
        out[f"{path}/{(NORM if norm else DENSE)[last]}"] = name, plain(spec.shape) if norm else layer(last, spec)
    return out


def test_names_that_change_their_meaning_are_refused_and_settled_by_given_rules():
    source = table("mobilenet_v2")
    counters = [name for name in source if name.endswith("num_batches_tracked")]
    expected = mobilenet(source)
    with pytest.raises(
        PlanError, match=r"align.. found no partner for 4 modules of the target and 4 of the source: none"
    ):
        align(source, target_of(expected))
    first = r"blocks\.0\.0\."
    known = (
        surgery.rename(first + r"conv_pw\.weight", "blocks/0/project/kernel"),
        surgery.rename(first + r"bn2\.weight", "blocks/0/project_bn/scale"),
        surgery.rename(first + r"bn2\.bias", "blocks/0/project_bn/bias"),
        surgery.rename(first + r"bn2\.running_(mean|var)", r"blocks/0/project_bn/\1"),
        surgery.rename(first + r"bn1\.weight", "blocks/0/depthwise_bn/scale"),
        surgery.rename(first + r"bn1\.bias", "blocks/0/depthwise_bn/bias"),
        surgery.rename(first + r"bn1\.running_(mean|var)", r"blocks/0/depthwise_bn/\1"),
    )
    rules, _ = check(source, expected, counters, known)
    assert rules[: len(known)] == known


# Scanned layers.


def blocks(count, *names, shape=(4, 6)):
    return {f"b.{i}.{name}": leaf(shape) for i in range(count) for name in names}


def test_numbered_blocks_are_stacked_turned_and_cut_into_heads_for_a_scanned_target():
    source = (
        blocks(3, "attn.q_proj.weight", shape=(6, 4))
        | blocks(3, "fc.weight", shape=(5, 4))
        | blocks(3, "ln.bias", shape=(4,))
    )
    target = {
        "layers": {
            "attention": {"query": {"kernel": leaf((3, 4, 2, 3))}},
            "dense": {"kernel": leaf((3, 4, 5))},
            "norm": {"bias": leaf((3, 4))},
        }
    }
    rules, report = align(source, target)
    assert {move.target: move.ops for move in surgery.plan(source, target, *rules).moves} == {
        "layers/attention/query/kernel": (("stack", 0), ("permute", (0, 2, 1)), ("reshape", (3, 4, 2, 3))),
        "layers/dense/kernel": (("stack", 0), ("permute", (0, 2, 1))),
        "layers/norm/bias": (("stack", 0),),
    }
    assert readable(rules)
    assert report.metadata["blocks"] == "b.# -> layers/# (3)"


def test_scanned_layers_of_a_file_are_unstacked():
    source = {"layers.attn.weight": leaf((2, 4, 3)), "layers.fc.weight": leaf((2, 5, 4)), "norm.weight": leaf((4,))}
    target = {
        "blocks": [{"attention": {"kernel": leaf((3, 4))}, "dense": {"kernel": leaf((4, 5))}} for _ in range(2)],
        "norm": {"scale": leaf((4,))},
    }
    rules, _ = align(source, target)
    moves = {move.target: (move.source, move.ops) for move in surgery.plan(source, target, *rules).moves}
    assert moves["blocks/1/attention/kernel"] == ("layers.attn.weight", (("take", 0, 1), ("permute", (1, 0))))
    assert moves["norm/scale"] == ("norm.weight", ())
    assert readable(rules)


def test_trees_with_the_same_names_scanned_and_not_are_stacked_and_unstacked():
    unrolled = {f"layers/{i}/{name}": leaf((4, 6)) for i in range(2) for name in ("up/kernel", "gate/kernel")}
    scanned = {f"layers/{name}": leaf((2, 4, 6)) for name in ("up/kernel", "gate/kernel")}
    stacks, _ = align(unrolled, scanned)
    assert stacks == (surgery.stack(r"layers/(?P<i>\d+)/(gate|up)/kernel", r"layers/\2/kernel"),)
    unstacks, _ = align(scanned, unrolled)
    assert unstacks == (surgery.unstack("layers/(gate|up)/kernel", r"layers/{i}/\1/kernel"),)


def test_what_no_rule_can_stack_is_refused():
    fused = blocks(2, "qkv.weight", shape=(12, 4)) | blocks(2, "fc.weight", shape=(5, 4))
    target = {name: {"kernel": leaf((2, 4, 4))} for name in ("query", "key", "value")} | {
        "fc": {"kernel": leaf((2, 4, 5))}
    }
    with pytest.raises(
        PlanError, match=r"the layers of the scanned 'layers/query/kernel' with .* each would be cut as well"
    ):
        align(fused, {"layers": target}, layout="torch")
    gap = {name.replace("b.1", "b.2"): one for name, one in blocks(2, "up.weight", "gate.weight").items()}
    scanned = {name: {"kernel": leaf((2, 6, 4))} for name in ("up", "gate")}
    with pytest.raises(PlanError, match=r"but no rule can say so: they are not numbered one by one. Align with a tree"):
        align(gap, {"layers": scanned})


# What is refused, and what settles it.


def attention(names, shape=(4, 4), path="layers/{}/{}/kernel"):
    return {path.format(i, name): leaf(shape) for i in range(2) for name in names}


def test_names_that_say_nothing_are_refused_with_the_candidates():
    source, target = blocks(2, "x.weight", "y.weight", shape=(4, 4)), attention(["query", "key"])
    with pytest.raises(PlanError) as caught:
        align(source, target, layout="torch")
    either = "(4, 4) float32: 'b.0.x.weight' (4, 4) float32 or 'b.0.y.weight' (4, 4) float32. "
    assert str(caught.value).splitlines() == [
        "align() cannot tell 2 candidate plans apart by names, shapes and order:",
        f"- target 'layers/0/key/kernel' {either}"
        r"If it is 'b.0.x.weight', write rename(r'b\.(\d+)\.x\.weight', r'layers/\1/key/kernel').",
        f"- target 'layers/0/query/kernel' {either}"
        r"If it is 'b.0.y.weight', write rename(r'b\.(\d+)\.y\.weight', r'layers/\1/query/kernel').",
        "Pass what you know as align(..., rules=(...)), or pass source, probe and read, so that the outputs decide.",
    ]


def test_one_rule_of_the_refusal_settles_it():
    source, target = blocks(2, "x.weight", "y.weight", shape=(4, 4)), attention(["query", "key"])
    known = surgery.rename(r"b\.(\d+)\.x\.weight", r"layers/\1/query/kernel")
    rules, _ = align(source, target, rules=(known,), layout="torch")
    assert rules == (known, surgery.rename(r"b\.(\d+)\.y\.weight", r"layers/\1/key/kernel"), surgery.torch_layout())


def test_stacks_of_the_refusal_settle_a_scanned_target():
    source = blocks(2, "x.weight", "y.weight", shape=(4, 4))
    target = {"layers": {name: {"kernel": leaf((2, 4, 4))} for name in ("m", "n")}}
    written = r"write stack(r'b\.(?P<i>\d+)\.x\.weight', 'layers/m/kernel', axis=0)"
    with pytest.raises(PlanError, match=re.escape(written)):
        align(source, target, layout="torch")
    known = tuple(surgery.stack(rf"b\.(?P<i>\d+)\.{a}\.weight", f"layers/{b}/kernel") for a, b in ("xn", "ym"))
    rules, _ = align(source, target, rules=known, layout="torch")
    assert rules == (*known, surgery.permute("**/kernel", (0, 2, 1)))


def test_more_candidates_than_can_be_tried_are_refused():
    names = [f"{letter}.weight" for letter in "pqrstu"]
    with pytest.raises(PlanError, match="cannot tell more than 128 candidate plans apart"):
        align(blocks(2, *names, shape=(4, 4)), attention(["a", "b", "c", "d", "e", "f"]), layout="torch")


def test_square_kernels_alone_say_nothing_of_the_layout():
    with pytest.raises(
        PlanError, match=r"all 1 kernels are square \('fc.weight' .*Write layout='torch' \(transposed\) or"
    ):
        align({"fc.weight": leaf((4, 4))}, {"fc": {"kernel": leaf((4, 4))}})
    turned, _ = align({"fc.weight": leaf((4, 4))}, {"fc": {"kernel": leaf((4, 4))}}, layout="torch")
    kept, report = align({"fc.weight": leaf((4, 4))}, {"fc": {"kernel": leaf((4, 4))}}, layout="same")
    assert surgery.torch_layout() in turned and surgery.torch_layout() not in kept
    assert report.metadata["layout"] == "axes as in the target: as given or found by outputs"


def test_layouts_that_lead_to_other_pairs_are_refused():
    source = {"a.weight": leaf((4, 6)), "b.weight": leaf((6, 4))}
    with pytest.raises(PlanError, match=r"layouts 'torch' and 'same' lead to other pairs. Write layout="):
        align(source, {"m": {"kernel": leaf((4, 6))}, "n": {"kernel": leaf((6, 4))}})


def test_a_last_layer_by_no_name_of_one_is_refused_with_what_to_write():
    source = {"fc1.weight": leaf((4, 3)), "linear.weight": leaf((10, 4)), "linear.bias": leaf((10,))}
    target = {"dense": {"kernel": leaf((3, 4))}, "output": {"kernel": leaf((4, 2)), "bias": leaf((2,))}}
    with pytest.raises(PlanError, match=r"or fresh\('output/\*\*'\)\.\n- source .* or waive\('linear\.\*'\)\."):
        align(source, target)
    known = (surgery.fresh("output/**"), surgery.waive("linear.*"))
    rules, _ = align(source, target, rules=known)
    assert rules == (*known, surgery.rename(r"fc1\.weight", "dense/kernel"), surgery.torch_layout())


def test_blocks_of_which_several_choices_fit_are_refused():
    with pytest.raises(
        PlanError, match=r"3 blocks 'b\.#' and the target 2 blocks 'layers/#' of the same sizes, so that sev"
    ):
        align(blocks(3, "fc.weight"), attention(["fc"], (6, 4)))
    source = {f"{side}.{i}.fc.weight": leaf((6, 4)) for side in ("left", "right") for i in range(2)}
    with pytest.raises(
        PlanError, match=r"the target's blocks 'layers/#' fit the source's 'left\.#' and 'right\.#' alike"
    ):
        align(source, attention(["fc"], (4, 6)))


def test_long_refusals_are_cut_short():
    many = {f"{letter * 3}.weight": leaf((n + 2, 3)) for n, letter in enumerate("abcdefghijkl")}
    with pytest.raises(PlanError, match="- 4 more modules of the source"):
        align(many, {"x": leaf((99, 98))})


def test_a_given_rule_must_be_one_and_change_only_what_is_named():
    source, target = {"fc.weight": leaf((4, 6))}, {"fc": {"kernel": leaf((6, 4))}}
    with pytest.raises(PlanError, match=r"rule 0 given to align.. is str; expected one such as fresh"):
        align(source, target, rules=("fc",))
    with pytest.raises(
        PlanError, match=r"was given to align\(\), which pairs 'fc/kernel' itself and finds how to turn"
    ):
        align(source, target, rules=(surgery.torch_layout(),))
    with pytest.raises(PlanError, match=r"layout 'pytorch' is unknown. Expected one of 'torch', 'same', or None"):
        align(source, target, layout="pytorch")
    with pytest.raises(PlanError, match="does nothing: it matched no name in full"):
        align(source, target, rules=(surgery.rename("cf.weight", "fc/kernel"),))
    with pytest.raises(PlanError, match=r"source leaf 'fc.weight' is float; expected something with shape and dtype"):
        align({"fc.weight": 1.0}, target)


def test_given_rules_of_every_kind_are_kept():
    source = {
        "q.weight": leaf((4, 4)),
        "k.weight": leaf((4, 4)),
        "fc.weight": leaf((6, 8)),
        "embed.weight": leaf((9, 4)),
    }
    target = {
        "qk": {"kernel": leaf((4, 8))},
        "dense": {"kernel": leaf((8, 6))},
        "embed": {"embedding": leaf((9, 4))},
        "output": {"kernel": leaf((4, 9))},
    }
    known = (
        surgery.fuse((r"q\.weight", r"k\.weight"), "qk/kernel", axis=0),
        surgery.tie("output/kernel", "embed/embedding"),
        surgery.permute("output/kernel", (1, 0)),
    )
    rules, _ = align(source, target, rules=known)
    moves = {move.target: (move.source, move.ops) for move in surgery.plan(source, target, *rules).moves}
    assert moves == {
        "qk/kernel": (("q.weight", "k.weight"), (("concat", 0), ("permute", (1, 0)))),
        "dense/kernel": ("fc.weight", (("permute", (1, 0)),)),
        "embed/embedding": ("embed.weight", ()),
        "output/kernel": ("embed.weight", (("permute", (1, 0)),)),
    }


def test_a_leaf_of_another_dtype_is_cast():
    source, target = {"fc.weight": leaf((4, 6), "float16")}, {"fc": {"kernel": leaf((6, 4), "bfloat16")}}
    rules, _ = align(source, target)
    assert surgery.cast("**", "bfloat16") in rules


# Outputs of the original network.


class Attention(nnx.Module):
    """Attention of one head between the rows of ``[B, 4, 4]``."""

    def __init__(self, rngs):
        dense = lambda: nnx.Linear(4, 4, bias_init=nnx.initializers.normal(), rngs=rngs)
        self.query, self.key, self.value, self.out = dense(), dense(), dense(), dense()

    def __call__(self, x):
        weights = jax.nn.softmax(self.query(x) @ self.key(x).mT)
        return self.out(weights @ self.value(x))


def original(**names):
    """The network with random weights, its arrays in torch's layout under other names, its function, and a batch."""
    model = interop.nnx(Attention(nnx.Rngs(0)))
    arrays = surgery.leaves(model)
    rename = lambda path: names[path.split("/")[0]] + (".weight" if path.endswith("kernel") else ".bias")
    file = {rename(path): np.array(array.T) for path, array in arrays.items()}
    batch = jax.random.normal(jax.random.key(1), (3, 4, 4))
    return model, dict(sorted(file.items())), (lambda x: model.apply(model.params, model.extra, x)[0]), batch


TARGET = abstract(lambda: Attention(nnx.Rngs(0)))
NOTHING = {"query": "elm", "key": "ash", "value": "oak", "out": "fir"}


def test_outputs_settle_square_kernels_whose_names_say_nothing():
    model, file, network, batch = original(**NOTHING)
    with pytest.raises(PlanError, match="cannot tell 48 candidate plans apart"):
        align(file, TARGET)
    rules, report = align(file, TARGET, source=network, probe=batch, read=file)
    made = surgery.plan(file, TARGET, *rules).apply(file)
    jax.tree.map(np.testing.assert_array_equal, made, surgery.leaves(model))
    assert re.fullmatch(
        r"1 of 48 candidates gives those of source, relative error \d\.\de[-+]\d\d", report.metadata["outputs"]
    )


def test_outputs_find_that_names_lie():
    model, file, network, batch = original(query="key", key="query", value="value", out="out")
    wrong = surgery.plan(file, TARGET, *align(file, TARGET, layout="torch")[0])
    assert {move.source for move in wrong.moves if move.target == "query/kernel"} == {"query.weight"}
    rules, _ = align(file, TARGET, layout="torch", source=network, probe=batch, read=file.__getitem__)
    jax.tree.map(np.testing.assert_array_equal, surgery.plan(file, TARGET, *rules).apply(file), surgery.leaves(model))


def test_outputs_that_agree_with_no_candidate_or_with_several_are_refused():
    _, file, network, batch = original(**NOTHING)
    with pytest.raises(
        PlanError, match="tried 48 candidate plans on the probe, and none of them gave the outputs of source"
    ):
        align(file, TARGET, source=lambda x: network(x) + 1.0, probe=batch, read=file)
    still = jax.tree.map(np.zeros_like, file)
    with pytest.raises(PlanError, match="tried 48 candidate plans on the probe, and 48 of them gave the outputs"):
        align(file, TARGET, source=jnp.zeros_like, probe=batch, read=still)
    with pytest.raises(PlanError, match="and none of them gave the outputs"):
        align(file, TARGET, source=lambda x: network(x)[:, :3], probe=batch, read=file)


def test_outputs_need_everything_and_no_fresh_leaf():
    _, file, network, batch = original(**NOTHING)
    with pytest.raises(
        PlanError, match=r"compares outputs with all of source, probe, read and a Model as target; it got a Mo"
    ):
        align(file, TARGET, source=network)
    with pytest.raises(PlanError, match="it got dict as target, a probe and read"):
        align(file, {}, source=network, probe=batch, read=file)
    wider = TARGET._replace(params={**TARGET.params, "head": {"kernel": leaf((4, 7))}})
    with pytest.raises(
        PlanError, match="cannot compare the outputs of source with those of a target of which leaves are fresh"
    ):
        align(file, wider, source=network, probe=batch, read=file)


# Its parts.


def test_as_many_rows_and_columns_as_fit_are_paired():
    far = -np.inf
    found = assign(np.array([[1.0, far, far], [0.5, far, far], [far, 0.2, 0.2]]))
    assert found.columns[0] == 0 and found.columns[1] == -1 and found.tied == (2,)
    full = np.full((16, 16), far)
    full[:, 0] = np.arange(16.0)
    full[0, 1] = 1.0
    assert assign(full).columns == (1, *[-1] * 14, 0)


def test_pairings_agree_with_trying_them_all():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = np.where(rng.uniform(size=(4, 5)) < 0.8, rng.uniform(size=(4, 5)), -np.inf)
        value = lambda way, table=scores: sum(table[r, c] + 100 for r, c in enumerate(way) if np.isfinite(table[r, c]))
        best = max(itertools.permutations(range(5), 4), key=value)
        found = assign(scores)
        assert np.isclose(value(best), sum(scores[r, c] + 100 for r, c in enumerate(found.columns) if c >= 0))
        for row, margin in enumerate(found.margins):
            others = lambda way, r=row, table=scores: way[r] if np.isfinite(table[r, way[r]]) else -1
            second = max(value(w) for w in itertools.permutations(range(5), 4) if others(w) != found.columns[row])
            assert np.isclose(value(best) - second, margin, atol=1e-9)


def test_patterns_match_nothing_else():
    pairs = {f"b.{i}.fc.w": f"layers/{i}/fc/kernel" for i in (0, 1)}
    assert patterns(pairs, ["b.2.fc.w"])[0].written() == (r"b\.(0|1)\.fc\.w", r"layers/\1/fc/kernel")
    assert patterns({"x1y": "a12b"}, [])[0].written() == ("x1y", "a12b")
    assert patterns({"x1y": "1b2", "x3y": "3b2"}, [])[0].written() == (r"x(\d+)y", r"\1b2")


def test_covers_select_nothing_else():
    everything = ["a/0/kernel", "a/1/kernel", "a/bias", "odd[name]"]
    assert [repr(one) for one in cover(["a/0/kernel"], everything)] == ["'a/0/kernel'"]
    (only,) = cover(["odd[name]"], everything)
    assert [name for name in everything if only(name)] == ["odd[name]"]


def test_a_thousand_leaves_take_seconds():
    def seconds(layers):
        shapes = {
            "attn.q": (8, 8),
            "attn.k": (8, 8),
            "attn.v": (8, 8),
            "attn.o": (8, 8),
            "mlp.fc1": (32, 8),
            "mlp.fc2": (8, 32),
        }
        source = {f"blocks.{i}.{n}.weight": leaf(s) for i in range(layers) for n, s in shapes.items()}
        source |= {f"blocks.{i}.{n}.bias": leaf(s[:1]) for i in range(layers) for n, s in shapes.items()}
        paths = dict(
            zip(shapes, ("attention/query", "attention/key", "attention/value", "attention/out", "mlp/up", "mlp/down"))
        )
        target = {f"layers/{i}/{paths[n]}/kernel": leaf(s[::-1]) for i in range(layers) for n, s in shapes.items()}
        target |= {f"layers/{i}/{paths[n]}/bias": leaf(s[:1]) for i in range(layers) for n, s in shapes.items()}
        begin = time.process_time()
        rules, _ = align(source, target)
        spent = time.process_time() - begin
        assert len(rules) <= 14 and surgery.plan(source, target, *rules).counts()["waived"] == 0
        return spent

    seconds(2)
    assert seconds(100) < 10.0


def test_hundreds_of_modules_of_one_shape_take_seconds():
    source = {f"conv2d_{i}.weight": leaf((8, 8, 3, 3)) for i in range(300)}
    target = {f"conv{i}/kernel": leaf((3, 3, 8, 8)) for i in range(300)}
    begin = time.process_time()
    rules, _ = align(source, target)
    assert time.process_time() - begin < 15.0
    assert rules == (surgery.rename(r"conv2d_(\d+)\.weight", r"conv\1/kernel"), surgery.torch_layout())


def test_leaves_of_a_fresh_leaf_s_name_are_left_behind_with_it():
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)
    file = {"conv/kernel": spec(3, 3, 1, 4), "dense/kernel": spec(36, 6), "dense/bias": spec(6)}
    mine = {"conv/kernel": spec(3, 3, 1, 4), "dense/kernel": spec(64, 4), "dense/bias": spec(4)}
    rules, _ = surgery.align(file, mine, rules=(surgery.fresh("dense/**"),))
    made = surgery.plan(file, mine, *rules)
    assert made.counts() == {"copied": 1, "transformed": 0, "fresh": 2, "waived": 2}
    assert {move.target for move in made.replaced} == {"dense/kernel", "dense/bias"}
    with pytest.raises(PlanError) as error:
        surgery.align(file, {**mine, "dense/kernel": spec(36, 4)})
    assert "Write adapt('dense/bias', ...) or waive('dense/**')." in str(error.value)


def test_a_file_of_more_blocks_says_how_to_choose_among_them():
    layers = lambda form, count: {form.format(i, part): leaf((8, 4)) for i in range(count) for part in "ab"}
    source, target = layers("h.{}.{}.weight", 12), nest(layers("h/{}/{}/kernel", 6))
    with pytest.raises(PlanError) as error:
        align(source, target)
    text = str(error.value)
    chosen = r"waive(regex(r'h\.(1|3|5|7|9|11)\D.*'))"
    assert (
        f"Write which to leave behind, for example {chosen}; where the names are those of the target, select(" in text
    )
    assert "h.11.a.weight" not in text
    rules, _ = align(source, target, rules=(surgery.waive(regex(r"h\.(1|3|5|7|9|11)\D.*")),))
    moves = surgery.plan(source, target, *rules).moves
    assert [move.source for move in moves[:3]] == ["h.0.a.weight", "h.0.b.weight", "h.2.a.weight"]
    source = layers("h/{}/{}/kernel", 12)
    with pytest.raises(PlanError) as error:
        align(source, target)
    assert r"Write, for example, select(r'h/(?P<i>\d+)\D.*', [0, 2, 4, 6, 8, 10])" in str(error.value)
    rules, _ = align(source, target, rules=(surgery.select(r"h/(?P<i>\d+)\D.*", [0, 2, 4, 6, 8, 10]),))
    assert surgery.plan(source, target, *rules).moves[2].source == "h/2/a/kernel"


@pytest.mark.parametrize(
    ("source", "target", "rules", "message"),
    [
        ({}, {"a": leaf((2,))}, (), "align() found no leaf in source_shapes. Pass Checkpoint.shapes as source, and"),
        ({"a": leaf((2,))}, None, (), "align() found no leaf in target."),
        ({"a": leaf((2,))}, {"a": leaf((2,))}, surgery.fresh("a"),
         "align() takes several rules, and fresh('a') is one. Write (fresh('a'),), a tuple."),
        ({"a": leaf((2,))}, {"a": leaf((2,))}, 5,
         "align() takes a tuple of rules; int came. Write (rename(...), fresh(...))."),
    ],
)  # fmt: skip
def test_what_is_no_side_or_no_rules_is_said(source, target, rules, message):
    with pytest.raises(PlanError) as error:
        align(source, target, rules=rules)
    assert message in str(error.value)
