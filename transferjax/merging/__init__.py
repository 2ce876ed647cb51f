"""Weight space: several models of one shape become one, without training and leaf by leaf."""

from transferjax.merging._average import greedy_soup, soup, wise_ft
from transferjax.merging._dare import dare
from transferjax.merging._leafwise import Merged, leafwise
from transferjax.merging._permutations import apply_permutations
from transferjax.merging._rebasin import Rebasin, match_activations, rebasin
from transferjax.merging._search import search
from transferjax.merging._sphere import karcher, model_stock, slerp
from transferjax.merging._statistics import fisher, regmean
from transferjax.merging._symmetries import permutation_spec
from transferjax.merging._ties import ties
from transferjax.merging._vectors import breadcrumbs, task_arithmetic

__all__ = [
    "Merged", "Rebasin", "apply_permutations", "breadcrumbs", "dare", "fisher", "greedy_soup", "karcher", "leafwise",
    "match_activations", "model_stock", "permutation_spec", "rebasin", "regmean", "search", "slerp", "soup",
    "task_arithmetic", "ties", "wise_ft",
]  # fmt: skip
