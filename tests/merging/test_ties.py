"""The compiled formula of large leaves is that of small ones."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import transferjax as tj
from transferjax._errors import DataError
from transferjax.merging import _largest, _leaf, _ties, leafwise, ties

SIZE = 5000  # nineteen steps and a rest
STEP = 256
PROGRAM = _ties._program
RNG = np.random.default_rng(0)
LEAVES = {
    "normal": lambda: RNG.standard_normal(SIZE),
    "few values": lambda: RNG.integers(-3, 4, SIZE),
    "all equal": lambda: np.ones(SIZE),
    "all zero": lambda: np.zeros(SIZE),
    "beyond float16": lambda: 1e9 * RNG.standard_normal(SIZE),
}
CALLS = {
    "plain": {},
    "weighted": {"weights": [0.5, -1.0, 2.0], "scale": 0.7},
    "all": {"density": 1.0},
    "none": {"density": 0.0},
    "one": {"density": 1 / SIZE},
}


def trees(draw, dtype=np.float32):
    return [{"w": draw().astype(dtype).reshape(50, 100)} for _ in range(4)]


@pytest.fixture
def compiled(monkeypatch):
    """Every leaf counts as large; how often the compiled formula was called."""
    calls, program = [], _ties._program
    monkeypatch.setattr(_leaf, "LARGE", 0)
    monkeypatch.setattr(_leaf, "STEP", STEP)
    monkeypatch.setattr(_ties, "_program", lambda *args: calls.append(len(args)) or program(*args))
    return calls


def both(base, models, monkeypatch, compiled, **options):
    """What the compiled formula and numpy's make."""
    found = ties(base, models, **options)["w"]
    count = len(compiled)
    with monkeypatch.context() as patch:
        patch.setattr(_leaf, "LARGE", 1 << 60)
        expected = ties(base, models, **options)["w"]
    assert len(compiled) == count
    return found, expected


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("leaf", LEAVES)
def test_it_is_that_of_numpy(leaf, call, monkeypatch, compiled):
    base, *models = trees(LEAVES[leaf])
    found, expected = both(base, models, monkeypatch, compiled, **CALLS[call])
    assert len(compiled) == SIZE // STEP and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(found == base["w"], expected == base["w"])  # the same entries are kept


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_of_half_precision_too(dtype, monkeypatch, compiled):
    base, *models = trees(LEAVES["normal"], dtype)
    found, expected = both(base, models, monkeypatch, compiled)
    assert compiled and found.dtype == dtype
    np.testing.assert_array_equal(found, expected)


def test_float64_stays_with_numpy(monkeypatch, compiled):
    base, *models = trees(LEAVES["normal"], np.float64)
    found, expected = both(base, models, monkeypatch, compiled)
    assert not compiled and found.tobytes() == expected.tobytes()


def test_without_a_cpu_numpy_computes(monkeypatch, compiled):
    base, *models = trees(LEAVES["normal"])
    expected = ties(base, models)["w"]
    count = len(compiled)
    monkeypatch.setattr(_leaf, "_cpu", lambda: None)
    np.testing.assert_allclose(ties(base, models)["w"], expected, rtol=1e-6)
    assert len(compiled) == count


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [3, SIZE - 1])
@pytest.mark.parametrize("number", [0, 2])
def test_what_is_not_finite_is_named(bad, place, number, compiled):
    found = trees(LEAVES["normal"])
    found[number]["w"].reshape(-1)[place] = bad
    name = "base" if number == 0 else "model 1"
    with pytest.raises(DataError, match=f"'w' has NaN or infinity in {name}. Expected finite numbers: leave that tree"):
        ties(found[0], found[1:])
    assert compiled


@pytest.mark.parametrize("place", [3, SIZE - 1])
def test_one_number_beyond_the_dtype_is_told(place, compiled):
    base, model = ({"w": np.zeros(SIZE, np.float16)} for _ in range(2))
    model["w"][place] = 60000
    assert ties(base, [model])["w"][place] == 60000
    with pytest.raises(DataError, match="'w' merges to numbers beyond float16"):
        ties(base, [model], scale=1.5)
    assert compiled


@pytest.mark.parametrize("place", [3, SIZE - 1])
def test_a_difference_beyond_float32_is_told_wherever_it_is(place, compiled):
    base, model = ({"w": np.zeros(SIZE, np.float32)} for _ in range(2))
    base["w"][place], model["w"][place] = 3e38, -3e38
    with pytest.raises(DataError, match="'w' merges to numbers beyond float32"):
        ties(base, [model], density=0.0)


@pytest.mark.parametrize(("dtype", "scale"), [(np.float16, 1e5), (ml_dtypes.bfloat16, 1e39), (np.float32, 3e38)])
def test_what_is_beyond_the_dtype_is_told(dtype, scale, compiled):
    base, *models = trees(lambda: 9 * RNG.standard_normal(SIZE), dtype)
    with pytest.raises(DataError, match=f"'w' merges to numbers beyond {np.dtype(dtype).name}. Expected smaller"):
        ties(base, models, scale=min(scale, 3e38))


@pytest.fixture
def configured():
    """Sets what JAX is configured to, for all threads."""
    before = {}

    def configure(name, value):
        before.setdefault(name, getattr(jax.config, name))
        jax.config.update(name, value)

    yield configure
    for name, value in before.items():
        jax.config.update(name, value)


SETTINGS = [
    ("jax_transfer_guard", "disallow"),
    ("jax_enable_x64", True),
    ("jax_numpy_dtype_promotion", "strict"),
    ("jax_numpy_rank_promotion", "raise"),
    ("jax_debug_nans", True),
    ("jax_debug_infs", True),
]


@pytest.mark.parametrize("alone", [0, 1 << 60])
@pytest.mark.parametrize(("name", "value"), SETTINGS)
def test_how_jax_is_configured_does_not_matter(name, value, alone, compiled, configured, monkeypatch):
    monkeypatch.setattr(_leaf, "ALONE", alone)  # one thread, or all
    base, *models = trees(LEAVES["normal"])
    expected = ties(base, models)["w"].tobytes()
    configured(name, value)
    assert ties(base, models)["w"].tobytes() == expected and len(compiled) == 2 * (SIZE // STEP)


@pytest.mark.parametrize(
    ("bad", "message"), [(np.nan, "has NaN or infinity in base"), (3e38, "merges to numbers beyond")]
)
@pytest.mark.parametrize(("name", "value"), SETTINGS)
def test_nor_does_it_for_errors(name, value, bad, message, compiled, configured):
    base, *models = trees(LEAVES["normal"])
    base["w"][0, 3] = bad
    for model in models:
        model["w"][0, 3] = 2e38
    configured(name, value)
    PROGRAM.clear_cache()  # what was compiled before does not look at all settings
    with pytest.raises(DataError, match=f"'w' {message}"):
        ties(base, models, scale=-9.0)
    assert compiled


def test_without_jit_too(compiled):
    base, *models = trees(LEAVES["normal"])
    expected = ties(base, models)["w"]
    with jax.disable_jit():
        np.testing.assert_allclose(ties(base, models)["w"], expected, rtol=1e-6)


def test_it_runs_on_the_cpu_whatever_the_default_device_is(compiled, monkeypatch):
    devices, program = [], _ties._program

    def noted(*arguments):
        devices.append(jax.config.jax_default_device)
        return program(*arguments)

    monkeypatch.setattr(_ties, "_program", noted)
    base, *models = trees(LEAVES["normal"])
    ties(base, models)
    assert devices and set(devices) == {jax.local_devices(backend="cpu")[0]} and jax.config.jax_default_device is None


def test_there_may_be_no_cpu(monkeypatch):
    def missing(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", missing)
    assert _leaf._cpu.__wrapped__() is None


@pytest.mark.parametrize("last", [-(2**40), -1, 700, 2**31 + 5, 2**40])
def test_places_beyond_int32(last, compiled, monkeypatch):
    """A leaf may have more than 2**31 elements, and the cut may lie as far behind a chunk, or before it."""
    monkeypatch.setattr(_ties, "largest", lambda *args: _largest.Cut(np.float32(1), last))
    base, model = {"w": np.zeros(SIZE, np.float32)}, {"w": np.ones(SIZE, np.float32)}
    np.testing.assert_array_equal(ties(base, [model])["w"], np.arange(SIZE) <= last)
    assert compiled


def test_one_program_for_all_leaves_and_coefficients(compiled, monkeypatch):
    """Their sizes differ, thresholds, weights and scale are arguments."""
    traced, elected = [], _ties._elected
    monkeypatch.setattr(
        _ties, "_elected", lambda base, *rest: traced.append(isinstance(base, jax.core.Tracer)) or elected(base, *rest)
    )
    PROGRAM.clear_cache()
    for size in (1024, 2000, SIZE):
        base, *models = ({"w": RNG.standard_normal(size).astype(np.float32)} for _ in range(4))
        ties(base, models, weights=[1.0, size, 2.0], density=0.3, scale=size / SIZE)
    assert sum(traced) == 1 and len(compiled) == 1024 // STEP + 2000 // STEP + SIZE // STEP


def test_leafwise_gives_the_same_bits(compiled, tmp_path):
    found = trees(LEAVES["normal"])
    for number, tree in enumerate(found):
        tj.io.save(tmp_path / f"{number}.safetensors", tree)
    base, *models = (tj.io.open(tmp_path / f"{number}.safetensors") for number in range(4))
    assert leafwise(ties, base, models)["w"].tobytes() == ties(found[0], found[1:])["w"].tobytes()


def test_the_magnitude_keeps_what_is_not_a_number():
    values = jnp.array([1.0, -3.0, 2.0])
    assert float(_leaf.magnitude(values, -values / 2)) == 3.0
    assert float(_leaf.magnitude(values, values.at[1].set(-jnp.inf))) == np.inf
    assert np.isnan(float(_leaf.magnitude(values.at[0].set(jnp.nan), values)))
