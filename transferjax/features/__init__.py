"""Feature transfer: what networks make of examples, pooled, read out and mapped; arrays in, arrays out."""

from transferjax.features._attentive import attentive
from transferjax.features._choice import best_layer, head2toe
from transferjax.features._extract import extract, raw_inputs
from transferjax.features._gaussian_process import gaussian_process
from transferjax.features._lda import lda
from transferjax.features._logistic import logistic
from transferjax.features._neighbours import knn, nearest_mean
from transferjax.features._readout import Readout
from transferjax.features._ridge import ridge
from transferjax.features._svm import svm
from transferjax.features._table import (
    FeatureTable,
    attention_pool,
    class_token,
    flatten,
    max_pool,
    mean_pool,
)

__all__ = [
    "FeatureTable", "Readout", "attention_pool", "attentive", "best_layer", "class_token", "extract", "flatten",
    "gaussian_process", "head2toe", "knn", "lda", "logistic", "max_pool", "mean_pool", "nearest_mean", "raw_inputs",
    "ridge", "svm",
]  # fmt: skip
