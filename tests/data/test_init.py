import subprocess
import sys

import transferjax.data


def test_the_import_needs_no_data_library():
    code = (
        "import sys, transferjax.data; "
        "found = {'tensorflow_datasets', 'grain', 'PIL', 'flax', 'tensorflow'} & set(sys.modules); "
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_documented():
    for name in transferjax.data.__all__:
        assert getattr(transferjax.data, name).__doc__
