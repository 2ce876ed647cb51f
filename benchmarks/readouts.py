"""Read-outs: a whole path at the price of one fit, and against scikit-learn.

Ridge with 20 strengths against ridge with one; logistic regression with 20 strengths in one program against
scikit-learn's fits one by one, which are stopped at the gradient norm that is reached here; the 20 nearest neighbours
by cosine against scikit-learn's brute force. Features are random with a spectrum that falls as that of networks does.
Run ``python benchmarks/readouts.py``; with ``--check`` it exits with 1 when a figure is missed; ``--scale 0.1`` takes a
tenth of the examples. Programs are compiled before they are measured. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

import jax
import numpy as np

import transferjax as tj
from transferjax.features._neighbours import knn
from transferjax.features._ridge import ridge
from transferjax.numerics._lbfgs import linear_path, softmax_loss

WIDTH, CLASSES, NEIGHBOURS, EXAMPLES, INDEX = 1280, 10, 20, 10_000, 50_000
STRENGTHS = np.logspace(-2, 4, 20)
PATH, LOGISTIC, KNN = 1.5, 1 / 3, 1.0


def examples(count):
    """Standardised features ``[N, d]`` with a falling spectrum, and labels that they tell something about."""
    rng = np.random.default_rng(0)
    codes = rng.permutation(count) % CLASSES
    spectrum = np.arange(1, WIDTH + 1) ** -0.5
    latent = (rng.normal(size=(CLASSES, WIDTH))[codes] + 2 * rng.normal(size=(count, WIDTH))) * spectrum
    mixing = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    x = np.maximum(latent @ mixing + 0.05, 0)
    return ((x - x.mean(0)) / x.std(0)).astype(np.float32), codes


def timed(functions, turns):
    """Median seconds of each function, in alternating turns."""
    times = [[] for _ in functions]
    for _ in range(turns):
        for function, found in zip(functions, times):
            begin = time.perf_counter()
            function()
            found.append(time.perf_counter() - begin)
    return [statistics.median(found) for found in times]


def ridge_path(x, codes, turns):
    ridge(x[:100], codes[:100], strengths=1.0)
    return timed([lambda: ridge(x, codes, strengths=STRENGTHS), lambda: ridge(x, codes, strengths=1.0)], turns)


def gradient_norm(x, wanted, kernel, bias, strength):
    scores = x @ kernel + bias
    shares = np.exp(scores - scores.max(1, keepdims=True))
    push = shares / shares.sum(1, keepdims=True) - wanted
    return np.sqrt(((x.T @ push + strength * kernel) ** 2).sum() + (push.sum(0) ** 2).sum()) / len(x)


def logistic_path(x, codes, turns, tolerance=1e-6):
    """Seconds of both, and the largest gradient norm per example of both."""
    from sklearn.linear_model import LogisticRegression

    x, wanted = x.astype(np.float64), np.eye(CLASSES)[codes]
    weights = np.ones(len(x))
    limits = {"curvature": (1e-4, 1 / CLASSES), "iterations": 1000, "tolerance": tolerance}
    solve = lambda: linear_path(x, wanted, weights, STRENGTHS, softmax_loss, **limits)
    path = solve()
    seconds = timed([solve], turns)
    spent, norms = 0.0, []
    for strength in STRENGTHS:
        stop = tolerance / 16
        while True:  # its tolerance is on the largest entry: the time of the fit that reaches the norm counts
            model = LogisticRegression(C=1 / strength, tol=stop, max_iter=10_000)
            begin = time.perf_counter()
            model.fit(x, codes)
            last = time.perf_counter() - begin
            norm = gradient_norm(x, wanted, model.coef_.T, model.intercept_, strength)
            if norm <= tolerance or stop < tolerance / 1000:
                break
            stop /= 4
        spent, norms = spent + last, [*norms, norm]
    ours = [gradient_norm(x, wanted, *part) for part in zip(path.kernels, path.biases, STRENGTHS)]
    return seconds[0], spent, max(ours), max(norms)


def neighbours(index, codes, queries, turns):
    from sklearn.neighbors import KNeighborsClassifier

    readout = knn(index, codes, k=NEIGHBOURS)
    peer = KNeighborsClassifier(
        NEIGHBOURS, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    )
    peer.fit(index, codes)
    ours = lambda: jax.block_until_ready(readout.predict(readout.params, queries))
    theirs = lambda: peer.predict_proba(queries)
    difference = float(np.abs(np.asarray(ours()) - theirs()).max())
    return *timed([ours, theirs], turns), difference


def measure(arguments):
    rows, facts = [], {}
    x, codes = examples(int((EXAMPLES + INDEX) * arguments.scale))
    count = int(EXAMPLES * arguments.scale)
    if "ridge" in arguments.only:
        path, one = ridge_path(x[:count], codes[:count], arguments.turns)
        rows.append(("ridge with 20 strengths, s (one)", path, one, PATH))
    if "logistic" in arguments.only:
        path, peer, norm, other = logistic_path(x[:count], codes[:count], arguments.turns)
        rows.append(("logistic with 20 strengths, s (scikit-learn)", path, peer, LOGISTIC))
        facts |= {"gradient norm here": float(norm), "gradient norm of scikit-learn": float(other)}
    if "knn" in arguments.only:
        ours, theirs, difference = neighbours(x[count:], codes[count:], x[:count], arguments.turns)
        rows.append((f"{NEIGHBOURS} neighbours, s (scikit-learn)", ours, theirs, KNN))
        facts["largest difference of shares"] = difference
    facts |= {"examples": count, "index": len(x) - count, "width": WIDTH, "device": jax.devices()[0].device_kind}
    facts["load"] = " ".join(f"{n:.1f}" for n in os.getloadavg())
    rows = [(what, ours, other, ours / other, limit, ours / other <= limit) for what, ours, other, limit in rows]
    columns = ("quantity", "here", "other", "ratio", "limit", "met")
    return tj.Report("Read-outs", columns, tuple(rows), facts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3, help="measured turns of each side")
    parser.add_argument("--scale", type=float, default=1.0, help="part of the examples")
    parser.add_argument("--only", nargs="*", default=["ridge", "logistic", "knn"], choices=["ridge", "logistic", "knn"])
    parser.add_argument("--check", action="store_true", help="exit with 1 when a figure is missed")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    report = measure(arguments)
    print(report)
    return int(arguments.check and not all(report.column("met")))


if __name__ == "__main__":
    sys.exit(main())
