"""Drift: CKA between two networks, layer by layer, from batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax.finetune import drift
from transferjax.scores import cka_matrix


def network(params, x):
    x = tj.interop.mark("z_stem", x @ params["stem"])
    x = tj.interop.mark("body", jnp.tanh(x @ params["body"]))
    return tj.interop.mark("a_head", x @ params["head"])


def model(seed=0, classes=3):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = {"stem": (5, 6), "body": (6, 4), "head": (4, classes)}
    return tj.interop.pure(network, {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items())})


def batches(*sizes):
    rng = np.random.default_rng(0)
    return [{"inputs": rng.normal(size=(size, 5)).astype(np.float32)} for size in sizes]


def cka(report):
    return dict(zip(report.column("layer"), report.column("CKA")))


def test_a_network_has_not_drifted_from_itself():
    report = drift(model(), model(), batches(16, 16))
    assert cka(report) == pytest.approx({"z_stem": 1, "body": 1, "a_head": 1, "(outputs)": 1}, abs=1e-9)
    assert report.metadata["examples"] == 32 and report.metadata["batches"] == 2


def test_cka_is_that_of_the_scores_and_layers_come_in_the_order_of_the_network():
    one, other, given = model(), model(1, classes=2), batches(16, 12, 20)
    report = drift(one, other, given)
    features = lambda m, x: m.capture(m.params, m.extra, x, "**")[2]
    pairs = [
        tuple({n: np.asarray(a) for n, a in features(m, b["inputs"]).items()} for m in (one, other)) for b in given
    ]
    expected = dict(zip(pairs[0][0], np.diag(cka_matrix(pairs))))
    assert report.column("layer") == ["z_stem", "body", "a_head", "(outputs)"]
    assert cka(report) == pytest.approx({**expected, "(outputs)": expected["a_head"]}, abs=1e-6)
    assert report.column("drift") == pytest.approx([1 - value for value in report.column("CKA")])
    most = min(cka(report), key=cka(report).get)
    assert report.metadata["drifted most"] == most and report.title.startswith("Drift: up to ")


def test_one_layer_that_moved_is_seen_from_there_on():
    base = model()
    tuned = base._replace(params={**base.params, "body": model(1).params["body"]})
    found = cka(drift(base, tuned, batches(32)))
    assert found["z_stem"] == pytest.approx(1, abs=1e-9) and found["body"] < 0.95


def test_layers_can_be_chosen_and_those_of_one_side_are_listed():
    def longer(params, x):
        return network(params, tj.interop.mark("new", x + 1))

    report = drift(model(), tj.interop.pure(longer, model().params), batches(16))
    assert dict(zip(report.column("layer"), report.column("state")))["new"] == "only in tuned"
    assert drift(model(), model(), batches(16), at="body").column("layer") == ["body", "(outputs)"]


def test_a_dead_layer_and_one_without_rows_have_no_cka_and_are_named():
    def apply(params, x):
        x = tj.interop.mark("dead", x * 0 + 1.3)
        return tj.interop.mark("mean", x.mean(0, keepdims=True)) + x + x @ params

    dead = tj.interop.pure(apply, jnp.eye(5))
    report = drift(dead, dead, batches(16))
    assert cka(report)["dead"] is None and cka(report)["mean"] is None
    assert report.metadata["alike for all examples"].startswith("dead")
    assert report.metadata["no row per example"] == "mean" and report.title == "Drift: no layer compared"


def test_images_are_compared_by_all_their_entries():
    conv = lambda params, x: tj.interop.mark("map", x[..., None] * params).mean((1, 2))
    one, other = (tj.interop.pure(conv, jnp.array(scale)) for scale in ([1.0, 2.0], [2.0, 4.0]))
    images = [{"inputs": np.random.default_rng(0).normal(size=(8, 3, 4)).astype(np.float32)}]
    assert cka(drift(one, other, images)) == pytest.approx({"map": 1, "(outputs)": 1}, abs=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"drift\(\) got no batch\. Expected dicts with inputs"),
        ([{"x": 1}], "got a batch with x; expected a dict with 'inputs'"),
        (batches(16, 3), r"got a batch of 3 examples\. Expected at least 4, as HSIC_1 divides"),
        ([{"inputs": np.full((4, 5), np.nan, np.float32)}], "'z_stem' of base are not finite in 4 of 4 examples"),
    ],
)
def test_batches_that_tell_nothing_raise(given, message):
    with pytest.raises(tj.DataError, match=message):
        drift(model(), model(), given)


def test_models_that_cannot_be_compared_raise():
    with pytest.raises(tj.SelectionError, match=r"drift\(\): tuned is Model that cannot say what its modules make"):
        drift(model(), model()._replace(capture=None), batches(8))
    with pytest.raises(tj.SelectionError, match=r"drift\(\): base: "):
        drift(model(), model(), batches(8), at="nowhere")
    abstract = model()._replace(params=jax.eval_shape(lambda: model().params))
    with pytest.raises(tj.TransferError, match=r"drift\(\): the weights of tuned are abstract"):
        drift(model(), abstract, batches(8))
