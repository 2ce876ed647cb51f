"""A drop-in for ``jax.lax.conv_general_dilated`` that is fast on the CPU backend too.

XLA runs grouped convolutions, those of few input channels and the derivatives of 1x1 convolutions slowly on CPU. All
have a fast form there; which form is compiled is chosen when the program is lowered, so GPU and TPU get the native
convolution:

- depthwise: a sum of k * k shifted products, which XLA fuses into one pass over the input;
- 1x1: a matrix product;
- few input channels (an image network's stem): a sum of products of one input number and a vector of outputs.

A convolution is bilinear, and so are the two maps that its derivatives need. The three are each other's
derivatives, so reverse mode works to any order without differentiating through the shifted form, whose own
derivative is slow.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from transferjax.numerics import _depthwise, _pointwise, _thin

LAYOUT = ("NHWC", "HWIO", "NHWC")
FORMS = {"depthwise": _depthwise, "pointwise": _pointwise, "thin": _thin}
FLOATS = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Window:
    """What is static of a convolution that has a fast form.

    Attributes:
      form: ``"depthwise"``, ``"pointwise"`` or ``"thin"``.
      strides: of both spatial axes.
      padding: ``(before, after)`` of both spatial axes.
      inputs: shape of the input ``(B, H, W, C)``.
      kernel: shape of the kernel ``(kh, kw, C or 1, D)``.
      precision: as ``jax.lax`` takes it.
    """

    form: str
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    inputs: tuple[int, int, int, int]
    kernel: tuple[int, int, int, int]
    precision: Any

    def native(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        groups = self.inputs[3] if self.form == "depthwise" else 1
        return lax.conv_general_dilated(
            x,
            kernel,
            self.strides,
            self.padding,
            dimension_numbers=LAYOUT,
            feature_group_count=groups,
            precision=self.precision,
        )


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Any,
    padding: Any,
    lhs_dilation: Any = None,
    rhs_dilation: Any = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """``jax.lax.conv_general_dilated``, with a fast form on CPU where there is one.

    Give it to a layer: ``nnx.Conv(..., conv_general_dilated=conv_general_dilated)``, the same for ``linen.Conv``.
    Depthwise, 1x1 and 3x3 stem convolutions in NHWC / HWIO layout have a fast form; every other call goes to
    ``jax.lax`` unchanged. Reverse mode works to any order; forward mode (``jax.jvp``) raises for the fast forms.

    Args:
      lhs: input ``[B, H, W, C]``.
      rhs: kernel ``[kh, kw, C / groups, D]``.
      window_strides: as for ``jax.lax.conv_general_dilated``, and so are all the others.
      padding: ``"SAME"``, ``"VALID"`` or explicit pairs.
      lhs_dilation: see ``jax.lax``.
      rhs_dilation: see ``jax.lax``.
      dimension_numbers: see ``jax.lax``; the fast forms need ``("NHWC", "HWIO", "NHWC")``.
      feature_group_count: number of groups; ``C`` makes the convolution depthwise.
      batch_group_count: see ``jax.lax``.
      precision: see ``jax.lax``.
      preferred_element_type: see ``jax.lax``.
      out_sharding: see ``jax.lax``.

    Returns:
      Output ``[B, H', W', D]`` in the dtype of ``lhs``.

    >>> import jax.numpy as jnp
    >>> x, kernel = jnp.ones((1, 4, 4, 8)), jnp.ones((3, 3, 1, 8))
    >>> y = conv_general_dilated(
    ...     x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=8)
    >>> y[0, :, :, 0].tolist()
    [[4.0, 6.0, 6.0, 4.0], [6.0, 9.0, 9.0, 6.0], [6.0, 9.0, 9.0, 6.0], [4.0, 6.0, 6.0, 4.0]]
    """
    rest = (lhs_dilation, rhs_dilation, batch_group_count, preferred_element_type, out_sharding)
    if _plain(lhs, rhs, dimension_numbers, *rest):
        window = _window(lhs.shape, rhs.shape, window_strides, padding, feature_group_count, precision)
        if window is not None:
            return _forward(window, lhs, rhs)
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        batch_group_count=batch_group_count,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )


def _plain(lhs, rhs, numbers, lhs_dilation, rhs_dilation, batch_groups, preferred, sharding) -> bool:
    """Whether dtypes, layout and options are those that the fast forms know."""
    if jnp.ndim(lhs) != 4 or jnp.ndim(rhs) != 4 or numbers is None or batch_groups != 1 or sharding is not None:
        return False
    if lhs.dtype != rhs.dtype or str(lhs.dtype) not in FLOATS or preferred not in (None, lhs.dtype):
        return False
    if lax.conv_dimension_numbers(lhs.shape, rhs.shape, numbers) != _layout(lhs.shape, rhs.shape):
        return False
    return all(d is None or tuple(d) == (1, 1) for d in (lhs_dilation, rhs_dilation)) and 0 not in lhs.shape


def _layout(lhs_shape, rhs_shape):
    return lax.conv_dimension_numbers(lhs_shape, rhs_shape, LAYOUT)


def _window(inputs, kernel, strides, padding, groups, precision) -> Window | None:
    """The static description of a convolution that has a fast form, else ``None``."""
    channels, size = inputs[3], kernel[:2]
    if groups == channels and groups > 1 and kernel[2:] == (1, channels):
        form = "depthwise"
    elif groups == 1 and kernel[2] == channels and size == (1, 1):
        form = "pointwise"
    elif groups == 1 and kernel[2] == channels and _thin.fits(kernel):
        form = "thin"
    else:
        return None
    strides = tuple(int(s) for s in strides)
    pads = lax.padtype_to_pads(inputs[1:3], size, strides, padding) if isinstance(padding, str) else padding
    pads = tuple((int(before), int(after)) for before, after in pads)
    if len(strides) != 2 or len(pads) != 2 or min(*pads[0], *pads[1]) < 0:
        return None
    if any(n + sum(p) < k for n, p, k in zip(inputs[1:3], pads, size)):
        return None
    return Window(form, strides, pads, tuple(inputs), tuple(kernel), precision)


def _on_cpu(fast: Any, native: Any, *operands: jax.Array) -> jax.Array:
    return lax.platform_dependent(*operands, cpu=fast, default=native)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _forward(window: Window, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution."""
    fast = partial(FORMS[window.form].forward, window)
    return _on_cpu(fast, window.native, x, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _to_inputs(window: Window, g: jax.Array, kernel: jax.Array) -> jax.Array:
    """The transpose of the convolution with respect to its input, at an output cotangent ``g``."""
    fast = partial(FORMS[window.form].to_inputs, window)
    shape = jax.ShapeDtypeStruct(window.inputs, g.dtype)
    native = lambda g, kernel: jax.linear_transpose(lambda x: window.native(x, kernel), shape)(g)[0]
    return _on_cpu(fast, native, g, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _to_kernel(window: Window, x: jax.Array, g: jax.Array) -> jax.Array:
    """The transpose of the convolution with respect to its kernel, at an output cotangent ``g``."""
    fast = partial(FORMS[window.form].to_kernel, window)
    shape = jax.ShapeDtypeStruct(window.kernel, x.dtype)
    native = lambda x, g: jax.linear_transpose(lambda kernel: window.native(x, kernel), shape)(g)[0]
    return _on_cpu(fast, native, x, g)


def _saving(function: Any) -> Any:
    return lambda window, a, b: (function(window, a, b), (a, b))


_forward.defvjp(
    _saving(_forward),
    lambda window, saved, g: (_to_inputs(window, g, saved[1]), _to_kernel(window, saved[0], g)),
)
_to_inputs.defvjp(
    _saving(_to_inputs),
    lambda window, saved, x: (_forward(window, x, saved[1]), _to_kernel(window, x, saved[0])),
)
_to_kernel.defvjp(
    _saving(_to_kernel),
    lambda window, saved, kernel: (_to_inputs(window, saved[1], kernel), _forward(window, saved[0], kernel)),
)
