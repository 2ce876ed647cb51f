"""``transferjax predict``: what a fine-tuned network says about images."""

from __future__ import annotations

import argparse
from typing import Any

from transferjax.cli._arguments import count, verb
from transferjax.cli._console import note, show


def add(verbs: Any) -> None:
    parser = verb(
        verbs,
        "predict",
        run,
        "what a fine-tuned network says about images",
        "Prints the most probable classes of each image file (JPEG, PNG and so on).",
        "  transferjax predict runs/first shoe.jpg coat.png --top 3",
    )
    parser.add_argument("directory", metavar="RUN", help="a directory that `transferjax finetune` made")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files")
    parser.add_argument("--top", type=count, default=3, metavar="K", help="how many classes per image (3)")
    parser.add_argument("--weights", metavar="PATH", help="where the pretrained weights are now, if they moved")
    parser.add_argument("--on-error", choices=("raise", "skip"), default="raise", help="with a damaged image (raise)")


def run(arguments: argparse.Namespace) -> int:
    import jax

    import transferjax as tj
    from transferjax.cli._recipe import moved, restored

    directory = moved(tj.io.Run.open(arguments.directory), arguments.weights, arguments.on_error)
    recipe, state, frozen = restored(directory)
    size, method = _size(recipe)
    read = [(path, image) for path in arguments.images if (image := _read(path, size, method, arguments)) is not None]
    if not read:
        raise tj.DataError("no image could be read.")
    params = recipe.tuning.merge(state.trainable, frozen)
    forward = jax.jit(lambda params, extra, images: jax.nn.softmax(recipe.model.apply(params, extra, images)[0]))
    rows = []
    for path, image in read:
        probabilities = jax.device_get(forward(params, state.extra, image[None]))[0]
        best = probabilities.argsort()[::-1][: arguments.top]
        rows += [(path, _name(recipe, number), float(probabilities[number])) for number in best]
    facts = {"run": str(directory.path), "step": int(state.step)}
    show(tj.Report("Predictions", ("image", "class", "probability"), tuple(rows), facts), arguments.json)
    return 0


def _size(recipe: Any) -> tuple[tuple[int, int], str]:
    import transferjax as tj

    preprocess = recipe.model.preprocess
    if preprocess is None:
        raise tj.DataError(
            f"{recipe.config['model']} has no preprocess, so what it does with images is unknown. "
            "Give its Model one: model._replace(preprocess=transferjax.Preprocess(size=(224, 224)))."
        )
    return preprocess.size, preprocess.interpolation


def _read(path: str, size: Any, method: str, arguments: argparse.Namespace) -> Any:
    """An image at the model's size, or ``None`` when it is damaged and that is allowed."""
    import transferjax as tj
    from transferjax.data._image import decode, resize

    try:
        return resize(decode(path, orient=True), size, method)
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        text = f"'{path}' cannot be read as an image: {getattr(error, 'strerror', None) or error}."
        if arguments.on_error == "skip":
            note(text)
            return None
        raise tj.DataError(f"{text} Expected an image file; --on-error skip leaves such files out.") from None


def _name(recipe: Any, number: int) -> str:
    return recipe.class_names[number] if recipe.class_names else str(number)
