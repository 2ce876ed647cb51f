"""How close a source is to a target task: features or predictions, and labels, to one number; higher is better."""

from transferjax.scores._counts import leep, nce, nleep
from transferjax.scores._evidence import logme
from transferjax.scores._otdd import otdd
from transferjax.scores._separation import gbc, h_score, h_score_regularized, parc, sfda, transrate
from transferjax.scores._similarity import a_distance, cka_matrix, knn_accuracy, linear_cka, mmd, rbf_cka
from transferjax.scores._task2vec import task2vec, task2vec_distance

__all__ = [
    "a_distance", "cka_matrix", "gbc", "h_score", "h_score_regularized", "knn_accuracy", "leep", "linear_cka", "logme",
    "mmd", "nce", "nleep", "otdd", "parc", "rbf_cka", "sfda", "task2vec", "task2vec_distance", "transrate",
]  # fmt: skip
