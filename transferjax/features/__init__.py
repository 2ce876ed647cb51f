"""Feature transfer: what networks make of examples, pooled, read out and mapped; arrays in, arrays out."""

from transferjax.features._attentive import attentive
from transferjax.features._choice import best_layer, head2toe
from transferjax.features._extract import bag_of_tokens, extract, raw_inputs
from transferjax.features._gaussian_process import gaussian_process
from transferjax.features._lda import lda
from transferjax.features._logistic import logistic
from transferjax.features._maps import FeatureMap, cca, coral, procrustes, ridge_map, subspace_alignment
from transferjax.features._mixing import layer_mixing
from transferjax.features._neighbours import knn, nearest_mean
from transferjax.features._pca import pca, whiten
from transferjax.features._readout import Readout
from transferjax.features._ridge import ridge
from transferjax.features._stitch import match_layers, receive, stitch
from transferjax.features._svm import svm
from transferjax.features._table import FeatureTable, attention_pool, class_token, flatten, max_pool, mean_pool
from transferjax.features._transport import optimal_transport

__all__ = [
    "FeatureMap", "FeatureTable", "Readout", "attention_pool", "attentive", "bag_of_tokens", "best_layer", "cca",
    "class_token", "coral", "extract", "flatten", "gaussian_process", "head2toe", "knn", "layer_mixing", "lda",
    "logistic", "match_layers", "max_pool", "mean_pool", "nearest_mean", "optimal_transport", "pca", "procrustes",
    "raw_inputs", "receive", "ridge", "ridge_map", "stitch", "subspace_alignment", "svm", "whiten",
]  # fmt: skip
