import subprocess
import sys

import pytest

from transferjax import interop


def test_flax_is_imported_with_its_first_use_only():
    code = (
        "import sys, transferjax.interop as i; from transferjax.interop._extend import extend; "
        "i.pure(lambda p, x: x, {}); assert not [m for m in sys.modules if m.split('.')[0] == 'flax']; "
        "i.nnx; assert 'flax' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_exists():
    assert set(interop.__all__) <= set(dir(interop))
    assert all(callable(getattr(interop, name)) for name in interop.__all__)


def test_an_unknown_name_raises():
    with pytest.raises(AttributeError, match="has no attribute 'torch'"):
        _ = interop.torch
