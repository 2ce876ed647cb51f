"""Everything public exists, and has a docstring with an example that is executed."""

import importlib
import inspect
import pathlib
import types

import pytest

import transferjax as tj

PACKAGES = sorted(path.parent.name for path in pathlib.Path(tj.__file__).parent.glob("*/__init__.py"))


def _names(module):
    return [(module, name) for name in getattr(module, "__all__", ())]


def _public():
    yield from _names(tj)
    for package in PACKAGES:
        yield from _names(importlib.import_module(f"transferjax.{package}"))


@pytest.mark.parametrize("name", tj.__all__)
def test_every_public_name_exists(name):
    assert getattr(tj, name) is not None and name in dir(tj)


def test_names_are_sorted_and_unique():
    assert tj.__all__ == sorted(set(tj.__all__))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_says_what_is_public_and_has_a_docstring(package):
    module = importlib.import_module(f"transferjax.{package}")
    assert module.__doc__, f"transferjax.{package} has no docstring"
    missing = [name for name in module.__all__ if not hasattr(module, name)]
    assert missing == [] and len(set(module.__all__)) == len(module.__all__)


def _needs_example(value):
    if inspect.isclass(value):
        # Errors are read, protocols are implemented, and tuples of fields are made by their functions.
        return not issubclass(value, Exception) and not getattr(value, "_is_protocol", False)
    return inspect.isroutine(value)


ELSEWHERE = {
    "Batches": "batches() makes it",
    "DeviceBatches": "to_device() makes it",
    "EfficientNetLite": "models.create() makes it, and it is large",
    "default_weights": "needs a package of weights",
    "load": "needs a package of weights",
}


def _documented_elsewhere(value):
    """Classes that only functions of ours make: the example stands with the function."""
    fields = hasattr(value, "_fields") or hasattr(value, "__dataclass_fields__")
    return value.__name__ in ELSEWHERE or (inspect.isclass(value) and fields)


def test_every_public_function_and_class_has_a_docstring_with_an_example():
    lacking = set()
    for module, name in _public():
        value = getattr(module, name)
        if isinstance(value, types.ModuleType) or not callable(value):
            continue
        if not _documented(value):
            lacking.add(f"{module.__name__}.{name}: no docstring")
        elif _needs_example(value) and not _documented_elsewhere(value) and ">>>" not in (value.__doc__ or ""):
            lacking.add(f"{module.__name__}.{name}: no example")
    assert sorted(lacking) == []


def _documented(value):
    doc = value.__doc__ or ""
    return bool(doc) and not doc.startswith(f"{getattr(value, '__name__', '')}(")
