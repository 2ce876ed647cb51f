"""DARE against mergekit under mergekit's masks, and the masks themselves."""

import jax
import numpy as np
import pytest

from transferjax._errors import DataError
from transferjax.merging import _dare, dare
from transferjax.merging._leaf import CHUNK

KEY = jax.random.key(0)
SIZE = 2 * CHUNK + 12_345


def masks(key=KEY, path="w", density=0.3, size=SIZE, models=1):
    """Which entries are kept of task vectors of ones, by model."""
    base, ones = {path: np.zeros(size, np.float32)}, {path: np.ones(size, np.float32)}
    found = []
    for number in range(models):
        weights = [float(n == number) for n in range(models)]
        found.append(dare(base, [ones] * models, weights, density, key, rescale=None)[path] == 1)
    return found


def test_rescaled_to_the_norm_it_is_that_of_mergekit(peer, close, monkeypatch):
    class Drawn:
        def __init__(self, words, leaf, number, density):
            self.mask = peer.arrays[f"masks-{leaf.path}"][number].ravel()

        def __call__(self, at, delta):
            return self.mask[at]

    monkeypatch.setattr(_dare, "_Mask", Drawn)
    options = peer.options("dare")
    found = dare(peer.base, peer.models, options["weights"], options["density"], KEY, scale=0.9, rescale="l1")
    assert options["scale"] == 0.9
    close(found, peer.tree("dare"))


def test_what_is_kept_is_divided_by_the_density():
    base, model = {"w": np.zeros(SIZE, np.float32)}, {"w": np.ones(SIZE, np.float32)}
    found = dare(base, [model], None, 0.25, KEY)["w"]
    assert set(found.tolist()) == {0.0, 4.0}
    assert found.mean() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("density", [1e-4, 1 / 512, 0.1, 1 / 3, 0.999])
def test_the_share_of_kept_entries_is_the_density(density):
    (mask,) = masks(density=density)
    assert abs(mask.mean() - density) < 4 * np.sqrt(density * (1 - density) / SIZE)


def test_at_density_one_all_are_kept():
    assert masks(density=1.0)[0].all()


def test_masks_differ_by_key_path_model_and_chunk():
    first, second = masks(models=2)
    several = [first, second, *masks(jax.random.key(1)), *masks(path="v")]
    several += [np.roll(first, CHUNK)]
    for number, one in enumerate(several):
        for other in several[:number]:
            assert np.corrcoef(one, other)[0, 1] == pytest.approx(0, abs=0.02)


def test_neighbours_are_independent():
    (mask,) = masks()
    for step in (1, 2, 8, 64):
        assert np.corrcoef(mask[step:], mask[:-step])[0, 1] == pytest.approx(0, abs=0.02)


def test_a_mask_does_not_depend_on_other_leaves_or_the_order_of_paths():
    base = {"b": np.zeros(50), "a": {"w": np.zeros((4, 5))}}
    model = {"a": {"w": np.ones((4, 5))}, "b": np.ones(50)}
    found = dare(base, [model], None, 0.5, KEY)
    alone = dare({"a/w": np.zeros((4, 5))}, [{"a/w": np.ones((4, 5))}], None, 0.5, KEY)
    assert found["a"]["w"].tolist() == alone["a/w"].tolist()


def test_old_keys_are_keys_and_rbg_keys_too():
    assert (masks(jax.random.PRNGKey(0))[0] == masks()[0]).all()
    assert masks(jax.random.key(0, impl="rbg"))[0].mean() == pytest.approx(0.3, abs=0.02)


def test_the_masks_stay_those_of_this_version():
    found = dare({"w": np.zeros(40)}, [{"w": np.ones(40)}], None, 0.4, jax.random.key(7), rescale=None)["w"]
    assert "".join(str(int(value)) for value in found) == "1000000001001111000111010001010001010000"


@pytest.mark.parametrize("rescale", ["density", "l1"])
def test_under_jit_the_masks_are_the_same(rescale):
    base, model = {"w": np.zeros(SIZE, np.float32)}, {"w": np.ones(SIZE, np.float32)}
    call = lambda base, model: dare(base, [model, model], [0.3, 0.7], 0.4, KEY, rescale=rescale)
    np.testing.assert_allclose(jax.jit(call)(base, model)["w"], call(base, model)["w"], rtol=1e-5)


def test_l1_keeps_the_sum_of_magnitudes_and_zeros():
    rng = np.random.default_rng(0)
    base = {"w": np.zeros(400), "same": np.ones(3)}
    model = {"w": rng.standard_normal(400), "same": np.ones(3)}
    found = dare(base, [model], None, 0.4, KEY, rescale="l1")
    assert np.abs(found["w"]).sum() == pytest.approx(np.abs(model["w"]).sum())
    assert found["same"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("key", [0, None, jax.random.split(KEY, 2), np.zeros(2)])
def test_a_key_is_a_key(key):
    with pytest.raises(DataError, match=r"dare\(\) got .* as key. Expected one key: jax.random.key\(0\)"):
        dare({"w": np.zeros(2)}, [{"w": np.zeros(2)}], None, 0.5, key)


def test_a_key_is_not_traced():
    trees = {"w": np.zeros(2)}
    with pytest.raises(DataError, match=r"got a traced key. Expected a key from outside of jit"):
        jax.jit(lambda key: dare(trees, [trees], None, 0.5, key))(KEY)


@pytest.mark.parametrize("density", [0, -1, 1.01])
def test_something_is_kept(density):
    with pytest.raises(DataError, match=r"dare\(\) got density=.*Expected a share of the elements in \(0, 1\]"):
        dare({"w": np.zeros(2)}, [{"w": np.zeros(2)}], None, density, KEY)


def test_the_rescaling_has_a_name():
    with pytest.raises(DataError, match=r"dare\(\) got rescale='l2'. Expected 'density', 'l1' or None"):
        dare({"w": np.zeros(2)}, [{"w": np.zeros(2)}], None, 0.5, KEY, rescale="l2")
