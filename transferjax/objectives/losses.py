"""Losses of arrays, which objectives are made of: how far a student is from its teacher, or one domain from another."""

from transferjax.objectives._adversarial import cdan, dann, mdd, reversal, reverse_gradient
from transferjax.objectives._alignment import afn, bsp, coral, jmmd, mk_mmd
from transferjax.objectives._confusion import entropy, information_maximisation, mcc
from transferjax.objectives._feature_losses import attention_transfer, crd, hint, srd, vid
from transferjax.objectives._logit_losses import TopK, dist, dkd, hard, kd, logit_standardised_kd, top_k
from transferjax.objectives._relation_losses import (
    correlation_congruence,
    pkt,
    rkd_angle,
    rkd_distance,
    similarity_preserving,
)
from transferjax.objectives._tuning_losses import (
    bss,
    categorical_contrastive,
    category_relation,
    channel_attention,
    co_tuning,
    contrastive_cross_entropy,
    delta,
)

__all__ = [
    "TopK", "afn", "attention_transfer", "bsp", "bss", "categorical_contrastive", "category_relation", "cdan",
    "channel_attention", "co_tuning", "contrastive_cross_entropy", "coral", "correlation_congruence", "crd", "dann",
    "delta", "dist", "dkd", "entropy", "hard", "hint", "information_maximisation", "jmmd", "kd",
    "logit_standardised_kd", "mcc", "mdd", "mk_mmd", "pkt", "reversal", "reverse_gradient", "rkd_angle", "rkd_distance",
    "similarity_preserving", "srd", "top_k", "vid",
]  # fmt: skip
