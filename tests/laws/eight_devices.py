"""Programs on eight simulated devices, each in a process of its own."""

import os
import subprocess
import sys
import textwrap

from .networks import QUICK

PREAMBLE = """
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp, numpy as np, optax, transferjax as tj
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
whole, data = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
on_one, on_eight = lambda tree: jax.tree.map(jnp.asarray, tree), lambda tree: jax.device_put(tree, whole)
rng = np.random.default_rng(0)
normal = lambda *shape: rng.normal(size=shape).astype("f")

def spread(*trees):
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(trees))

def agree(one, eight):
    assert one and list(one) == list(eight)
    for path, leaf in one.items():
        np.testing.assert_allclose(np.asarray(eight[path]), np.asarray(leaf), rtol=1e-5, atol=1e-5, err_msg=path)
"""


def check(program):
    """Runs a program after the preamble; it must end without an error or a warning, on eight devices."""
    flags = {"XLA_FLAGS": " ".join(f"--{name}={value}" for name, value in QUICK.items())}
    code = PREAMBLE + textwrap.dedent(program) + "\nprint('done on', jax.device_count())"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | flags)
    assert done.stdout.strip() == "done on 8", done.stderr[-2000:]
