"""The fast convolution against the native one on this machine's CPU: forward pass and gradient, layer by layer.

Run ``python benchmarks/convolution.py``; with ``--check`` it exits with 1 when a gradient is slower than the native
one, or a forward pass by more than a tenth (of a 1x1 convolution both are the same matrix product). Both forms
alternate in one process; a figure is the ratio of their fastest runs.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from transferjax import Report
from transferjax.numerics import conv_general_dilated

FORWARD, GRADIENT = 1.1, 1.0
# The layers of EfficientNet-Lite0 at 96x96: name, height, channels, outputs, kernel, stride, groups.
LAYERS = (
    ("depthwise 3x3", 48, 32, 32, 3, 1, 32),
    ("depthwise 3x3 /2", 48, 96, 96, 3, 2, 96),
    ("depthwise 5x5 /2", 24, 144, 144, 5, 2, 144),
    ("depthwise 5x5", 12, 240, 240, 5, 1, 240),
    ("depthwise 5x5", 6, 672, 672, 5, 1, 672),
    ("depthwise 5x5", 3, 1152, 1152, 5, 1, 1152),
    ("1x1", 48, 16, 96, 1, 1, 1),
    ("1x1", 6, 480, 80, 1, 1, 1),
)


def compiled(function, stride, groups, x, kernel, cotangent):
    """The convolution and its gradients, compiled."""
    numbers = ("NHWC", "HWIO", "NHWC")
    options = {"window_strides": (stride, stride), "padding": "SAME", "dimension_numbers": numbers}
    convolve = partial(function, **options, feature_group_count=groups)
    both = lambda x, kernel, g: jax.vjp(convolve, x, kernel)[1](g)
    return (
        jax.jit(convolve).lower(x, kernel).compile(),
        jax.jit(both).lower(x, kernel, cotangent).compile(),
    )


def fastest(calls, repeats):
    """Milliseconds of the fastest run of each call, in alternation."""
    best = [float("inf")] * len(calls)
    for _ in range(repeats):
        for number, call in enumerate(calls):
            started = time.perf_counter()
            jax.block_until_ready(call())
            best[number] = min(best[number], 1e3 * (time.perf_counter() - started))
    return best


def measure(batch, repeats):
    generator, rows = np.random.default_rng(0), []
    draw = lambda *shape: jnp.asarray(generator.normal(size=shape), jnp.float32)
    for name, size, channels, outputs, window, stride, groups in LAYERS:
        out = -(-size // stride)
        x, kernel = draw(batch, size, size, channels), draw(window, window, channels // groups, outputs)
        g = draw(batch, out, out, outputs)
        fast, fast_gradient = compiled(conv_general_dilated, stride, groups, x, kernel, g)
        native, native_gradient = compiled(jax.lax.conv_general_dilated, stride, groups, x, kernel, g)
        forward = fastest([partial(fast, x, kernel), partial(native, x, kernel)], repeats)
        gradient = fastest([partial(fast_gradient, x, kernel, g), partial(native_gradient, x, kernel, g)], repeats)
        rows.append((f"{name}, {size}x{size}x{channels}", *_with_ratio(forward), *_with_ratio(gradient)))
    columns = ("layer", "forward ms", "native ms", "ratio", "gradient ms", "native gradient ms", "gradient ratio")
    return Report(f"Fast and native convolution on CPU, batch {batch}", columns, tuple(rows))


def _with_ratio(times):
    return (*times, times[0] / times[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--check", action="store_true", help="exit with 1 when a layer is slower than it should be")
    arguments = parser.parse_args()
    report = measure(arguments.batch, arguments.repeats)
    print(report)
    slower = max(report.column("ratio")) > FORWARD or max(report.column("gradient ratio")) > GRADIENT
    return int(arguments.check and slower)


if __name__ == "__main__":
    sys.exit(main())
