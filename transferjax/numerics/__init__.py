"""Kernels and solvers that features, scores, objectives, merging and models share: arrays in, arrays out."""

from transferjax.numerics._activation import relu6
from transferjax.numerics._chunks import map_chunks
from transferjax.numerics._convolution import conv_general_dilated
from transferjax.numerics._fisher import diagonal_fisher
from transferjax.numerics._normalisation import batch_norm

__all__ = ["batch_norm", "conv_general_dilated", "diagonal_fisher", "map_chunks", "relu6"]
