"""Structure only: paths, selectors, labels, splitting and filling of any pytree."""

from transferjax.tree._modules import auxiliary, training_selector
from transferjax.tree._order import as_order
from transferjax.tree._paths import flatten, natural, nest, path_string, paths
from transferjax.tree._select import Selector, as_selector, everything, glob, label, mask, matches, regex, where
from transferjax.tree._split import copy, fill, split, summary

__all__ = [
    "Selector", "as_order", "as_selector", "auxiliary", "copy", "everything", "fill", "flatten", "glob", "label",
    "mask", "matches", "natural", "nest", "path_string", "paths", "regex", "split", "summary", "training_selector",
    "where",
]  # fmt: skip
