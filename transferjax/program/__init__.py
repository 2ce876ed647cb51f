"""What XLA sees: the live equations of a jaxpr, what they cost, what depends on what."""

from transferjax.program._compiled import Measurement, measure
from transferjax.program._cost import Cost, cost
from transferjax.program._depends import dependencies, order_of_use
from transferjax.program._interpret import inline, interpret, rebind
from transferjax.program._leaves import Lifted, LowRank, Scaled, Stacked, is_lifted
from transferjax.program._lift import Materialised, lift, materialised
from transferjax.program._liveness import Memory, predict_memory
from transferjax.program._quantised import NF4, Int8, Quantised, quantise_int8, quantise_nf4
from transferjax.program._walk import Body, Site, live

__all__ = [
    "NF4",
    "Body",
    "Cost",
    "Int8",
    "Lifted",
    "LowRank",
    "Materialised",
    "Measurement",
    "Memory",
    "Quantised",
    "Scaled",
    "Site",
    "Stacked",
    "cost",
    "dependencies",
    "inline",
    "interpret",
    "is_lifted",
    "lift",
    "live",
    "materialised",
    "measure",
    "order_of_use",
    "predict_memory",
    "quantise_int8",
    "quantise_nf4",
    "rebind",
]
