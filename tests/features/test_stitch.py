"""Layers that are alike, and networks made of two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transferjax as tj
from transferjax.features import FeatureTable
from transferjax.features._maps import procrustes, ridge_map
from transferjax.features._stitch import match_layers, receive, stitch

RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(64, 6)).astype(np.float32)


def network(params, x):
    x = tj.interop.mark("one", jnp.tanh(x @ params["one"]))
    return tj.interop.mark("two", x @ params["two"]) + params["bias"]


def model(width, seed):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return tj.interop.pure(network, {"one": draw(6, width), "two": draw(width, 3), "bias": draw(3)})


def receiver(back, at="one"):
    return tj.interop.insert(tj.extend(back, "stitch", jnp.zeros(())), at, receive)


def layer(one, at="one"):
    return np.asarray(one.capture(one.params, one.extra, INPUTS, at)[2][at])


def turned(one):
    """The network with its second layer turned: another basis for the same features."""
    turn = np.linalg.qr(np.random.default_rng(9).normal(size=(3, 3)))[0].astype(np.float32)
    return one._replace(params={**one.params, "two": one.params["two"] @ turn})


def test_a_network_stitched_to_itself_is_itself():
    own = model(5, 0)
    x = layer(own)
    stitched = stitch(own, receiver(own), procrustes(x, x), at="one")
    outputs, extra = jax.jit(stitched.apply)(stitched.params, stitched.extra, INPUTS)
    np.testing.assert_allclose(outputs, own.apply(own.params, {}, INPUTS)[0], atol=1e-4)
    assert extra == {"front": {}, "back": {}}
    _, _, caught = stitched.capture(stitched.params, stitched.extra, INPUTS, "*")
    np.testing.assert_allclose(caught["one"], x, atol=1e-4)


def test_the_front_of_one_runs_into_the_back_of_another_of_unlike_width():
    front, back = model(9, 1), model(4, 2)
    found = ridge_map(layer(front), layer(back), [1e-3])
    stitched = stitch(front, receiver(back), found, at="one")
    mapped = np.asarray(found.apply(found.params, layer(front)))
    expected = mapped @ back.params["two"] + back.params["bias"]
    np.testing.assert_allclose(stitched.apply(stitched.params, stitched.extra, INPUTS)[0], expected, atol=1e-4)
    whole = np.asarray(back.apply(back.params, {}, INPUTS)[0])
    assert ((expected - whole) ** 2).mean() < 0.2 * whole.var()  # it makes much of what the back alone makes
    slope = jax.grad(lambda params: stitched.apply(params, stitched.extra, INPUTS)[0].sum())(stitched.params)
    assert np.abs(slope["map"]["kernel"]).sum() > 0
    assert np.abs(slope["front"]["two"]).sum() == 0 == np.abs(slope["back"]["model"]["one"]).sum()


def test_other_auxiliary_weights_of_the_back_stay():
    own = model(5, 0)
    back = tj.extend(receiver(own), "other", jnp.ones(2))
    stitched = stitch(own, back, procrustes(layer(own), layer(own)), at="one")
    assert set(stitched.params["back"]["aux"]) == {"other"}
    stitched.apply(stitched.params, stitched.extra, INPUTS)


def test_layers_are_matched_by_linear_cka():
    own = model(5, 0)
    x, y = ({name: layer(one, name) for name in ("one", "two")} for one in (own, turned(own)))
    found, report = match_layers(
        FeatureTable(x, np.arange(64)),
        FeatureTable({name: array[::-1] for name, array in y.items()}, np.arange(64)[::-1]),
    )
    assert found == {"one": "one", "two": "two"}
    values = {row[:2]: row[2] for row in report.rows}
    assert values["two", "two"] == pytest.approx(1.0)
    one, two = (array - array.mean(0) for array in (x["one"], y["two"]))
    norm = lambda a, b: np.linalg.norm(a.T @ b)
    expected = norm(one, two) ** 2 / (norm(one, one) * norm(two, two))
    assert values["one", "two"] == pytest.approx(expected, rel=1e-5)
    assert (
        match_layers(FeatureTable({"flat": np.ones((9, 2))}, np.arange(9)), FeatureTable(x, np.arange(64)))[1].rows[0][
            2
        ]
        == 0
    )


def test_what_cannot_be_stitched_raises():
    own = model(5, 0)
    found = procrustes(layer(own), layer(own))
    with pytest.raises(
        tj.TransferError, match=r"stitch\(\) expects a front that can say what its modules make; capture"
    ):
        stitch(own._replace(capture=None), receiver(own), found, at="one")
    with pytest.raises(tj.SelectionError, match=r"the model has no auxiliary weights 'stitch'"):
        stitch(own, own, found, at="one")
    both = stitch(own, receiver(own), found, at="*")
    with pytest.raises(
        tj.SelectionError, match=r"stitch\(\): at selects 2 arrays. Expected one module with one output"
    ):
        both.apply(both.params, both.extra, INPUTS)
    narrow = stitch(own, receiver(model(4, 2)), found, at="one")
    with pytest.raises(
        tj.DataError, match=r"the map between the networks gives \(64, 5\) float32, and the module makes"
    ):
        narrow.apply(narrow.params, narrow.extra, INPUTS)
    with pytest.raises(tj.SelectionError, match=r"match_layers\(\) got a table without layers. Expected at least one"):
        match_layers(FeatureTable({}, np.arange(2)), FeatureTable({}, np.arange(2)))
