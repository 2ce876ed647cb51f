"""What XLA sees: the live equations of a jaxpr, what they cost, what depends on what."""

from transferjax.program._compiled import Measurement, measure
from transferjax.program._cost import Cost, cost
from transferjax.program._depends import dependencies, order_of_use
from transferjax.program._interpret import inline, interpret, rebind
from transferjax.program._walk import Body, Site, live

__all__ = [
    "Body",
    "Cost",
    "Measurement",
    "Site",
    "cost",
    "dependencies",
    "inline",
    "interpret",
    "live",
    "measure",
    "order_of_use",
    "rebind",
]
