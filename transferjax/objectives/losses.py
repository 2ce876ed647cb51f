"""Losses of arrays, which objectives are made of: how far two domains are apart, how certain predictions are."""

from transferjax.objectives._adversarial import cdan, dann, mdd, reversal, reverse_gradient
from transferjax.objectives._alignment import afn, bsp, coral, jmmd, mk_mmd
from transferjax.objectives._confusion import entropy, information_maximisation, mcc

__all__ = [
    "afn", "bsp", "cdan", "coral", "dann", "entropy", "information_maximisation", "jmmd", "mcc", "mdd", "mk_mmd",
    "reversal", "reverse_gradient",
]  # fmt: skip
