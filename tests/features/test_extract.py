"""One pass gives the features of every layer, in order, once per example, and goes on where it stopped."""

import collections
import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import transferjax as tj
from transferjax._errors import DataError, SelectionError
from transferjax.features import bag_of_tokens, extract, flatten, mean_pool, raw_inputs


class Network(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.stem(x))).mean((1, 2))))


MODEL = tj.interop.nnx(Network(nnx.Rngs(0)))
IMAGES = np.random.default_rng(0).normal(size=(10, 5, 5, 2)).astype(np.float32)


def batches(sizes=(4, 4, 2), start=100):
    first = 0
    for size in sizes:
        rows = slice(first, first + size)
        ids = np.arange(first, first + size) + start
        yield {"inputs": IMAGES[rows], "labels": ids % 3, "id": ids}
        first += size


def by_hand(at):
    outputs, _, captured = MODEL.capture(MODEL.params, MODEL.extra, IMAGES, at)
    return outputs, captured


def test_outputs_and_layers_come_in_one_pass_in_inference_mode():
    outputs, captured = by_hand("{stem,norm,head}")
    table = extract(MODEL, batches(), at="{stem,norm,head}")
    np.testing.assert_allclose(table["outputs"], outputs, rtol=1e-5, atol=1e-6)
    for name in ("stem", "norm"):
        np.testing.assert_allclose(table[name], captured[name].mean((1, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(table["head"], outputs, rtol=1e-5, atol=1e-6)
    assert table.ids.tolist() == list(range(100, 110)) and table.labels.tolist() == [i % 3 for i in range(100, 110)]
    assert list(table.arrays) == ["head", "norm", "stem", "outputs"]
    assert list(extract(MODEL, batches()).arrays) == ["outputs"]


def test_one_program_serves_a_smaller_last_batch(monkeypatch):
    traced = []
    apply = lambda *args, **options: traced.append(1) or MODEL.apply(*args, **options)
    table = extract(MODEL._replace(apply=apply), batches())
    assert len(traced) == 1 and len(table) == 10
    np.testing.assert_allclose(table["outputs"][8:], by_hand("head")[0][8:], rtol=1e-5, atol=1e-6)


def test_pooling_is_a_function_and_none_keeps_maps():
    assert extract(MODEL, batches(), at="stem", pool=None)["stem"].shape == (10, 5, 5, 4)
    assert extract(MODEL, batches(), at="stem", pool=flatten)["stem"].shape == (10, 100)
    most = extract(MODEL, batches(), at="stem", pool=lambda x: x.max((1, 2)) if x.ndim == 4 else x)["stem"]
    np.testing.assert_allclose(most, by_hand("stem")[1]["stem"].max((1, 2)), rtol=1e-5, atol=1e-6)


def test_an_interrupted_pass_goes_on_from_its_cache(tmp_path):
    make = lambda: tj.io.FeatureCache(tmp_path / "cache", fingerprint="network:1")
    whole = extract(MODEL, batches(), at="stem")

    def failing():
        yield next(batches())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(MODEL, failing(), at="stem", cache=make())
    cache = make()
    assert len(cache) == 4
    calls = []
    again = MODEL._replace(capture=lambda *a, **o: calls.append(1) or MODEL.capture(*a, **o))
    found = extract(again, batches(), at="stem", cache=cache)
    assert len(calls) == 1, "traced once for what was missing"
    for name in whole.arrays:
        np.testing.assert_allclose(found[name], whole[name], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.labels, whole.labels)
    nothing = MODEL._replace(capture=lambda *a, **o: pytest.fail("all of it is stored"))
    given = tj.data.batches(tj.data.arrays(IMAGES, whole.labels, whole.ids), 5, shuffle=False)
    np.testing.assert_array_equal(extract(nothing, given, at="stem", cache=cache)["stem"], found["stem"])


def test_texts_are_dicts_of_inputs():
    apply = lambda params, inputs: jnp.einsum("btd,bt->bd", inputs["x"][..., None] * params["kernel"], inputs["mask"])
    model = tj.interop.pure(apply, {"kernel": jnp.ones(3)})
    inputs = {"x": np.ones((4, 6), np.float32), "mask": np.ones((4, 6), np.float32)}
    given = [{"inputs": {k: v[:n] for k, v in inputs.items()}, "id": np.arange(n) + n} for n in (4, 2)]
    np.testing.assert_allclose(extract(model, given)["outputs"], np.full((6, 3), 6.0))
    with pytest.raises(DataError, match=r"a dict of mask, x; expected one array\. Tokens are no .* or bag_of_tokens"):
        raw_inputs(given)


def several_outputs(params, x):
    hidden = tj.interop.mark("zz/hidden", jnp.tanh(x @ params["kernel"]))
    return {
        "tokens10": hidden[:, None] + jnp.arange(3.0)[:, None],
        "tokens2": -hidden[:, None],
        "embedding": 2 * hidden,
    }


SEVERAL = tj.interop.pure(several_outputs, {"kernel": np.eye(4, 3, dtype=np.float32)})
ROWS = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
IN_ORDER = ["zz/hidden", "outputs/embedding", "outputs/tokens2", "outputs/tokens10"]


def rows(sizes=(4, 2)):
    first = np.cumsum([0, *sizes])
    return [
        {"inputs": ROWS[a:b], "id": np.arange(a, b), "labels": np.arange(a, b) % 2}
        for a, b in itertools.pairwise(first)
    ]


def test_outputs_with_names_keep_them_behind_the_layers():
    table = extract(SEVERAL, rows(), at="zz/hidden")
    assert list(table.arrays) == IN_ORDER and list(extract(SEVERAL, rows()).arrays) == IN_ORDER[1:]
    hidden = np.tanh(ROWS[:, :3])
    for name, expected in zip(IN_ORDER, (hidden, 2 * hidden, -hidden, hidden + 1)):
        np.testing.assert_allclose(table[name], expected, rtol=1e-5, atol=1e-6)
    assert extract(SEVERAL, rows(), pool=None)["outputs/tokens10"].shape == (6, 3, 3)
    assert table.ids.tolist() == list(range(6)) and table.labels.tolist() == [0, 1] * 3


@pytest.mark.parametrize("folder", [None, "cache"])
def test_outputs_with_names_come_from_a_cache_as_they_were(tmp_path, folder):
    make = lambda: tj.io.FeatureCache(folder and tmp_path / folder, fingerprint="several:1")
    cache, plain = make(), extract(SEVERAL, rows(), at="zz/hidden")
    first = extract(SEVERAL, rows(), at="zz/hidden", cache=cache)
    nothing = SEVERAL._replace(capture=lambda *a, **o: pytest.fail("all of it is stored"))
    again = extract(nothing, rows((3, 3)), at="zz/hidden", cache=make() if folder else cache)
    for table in (first, again):
        assert list(table.arrays) == IN_ORDER and table.labels.tolist() == plain.labels.tolist()
        for name in IN_ORDER:
            np.testing.assert_allclose(table[name], plain[name], rtol=1e-6, atol=1e-7)


TOKENS = np.random.default_rng(2).integers(0, 40, (5, 9))
MASK = np.arange(9) < np.array([[9], [4], [1], [0], [6]])


def texts(tokens=TOKENS, mask=MASK, cuts=(0, 2, 5), name="input_ids"):
    for a, b in itertools.pairwise(cuts):
        inputs = {name: tokens[a:b], **({} if mask is None else {"attention_mask": mask[a:b].astype(np.int32)})}
        yield {"inputs": inputs, "id": np.arange(a, b) + 7, "labels": np.arange(a, b) % 3}


def counted(mask, width):
    expected = np.zeros((5, width))
    for n in range(5):
        kept = [int(token) % width for token, there in zip(TOKENS[n], mask[n], strict=True) if there]
        for column, count in collections.Counter(kept).items():
            expected[n, column] = math.log(1 + count)
    return expected


@pytest.mark.parametrize("width", [1, 7, 40, 2048])
def test_a_bag_of_tokens_counts_what_is_no_padding(width):
    for mask, there in ((MASK, MASK), (None, np.ones_like(MASK))):
        table = bag_of_tokens(texts(mask=mask), width=width)
        assert table["inputs"].shape == (5, width) and table["inputs"].dtype == np.float32
        np.testing.assert_allclose(table["inputs"], counted(there, width), rtol=1e-6)
    assert table.ids.tolist() == [7, 8, 9, 10, 11] and table.labels.tolist() == [0, 1, 2, 0, 1]


def test_a_bag_of_tokens_is_the_same_for_all_integers_lengths_and_names():
    expected = counted(MASK, 2048)
    for tokens in (*map(TOKENS.astype, (np.int8, np.uint8, np.int32, np.uint64)), jnp.asarray(TOKENS, jnp.int8)):
        np.testing.assert_allclose(bag_of_tokens(texts(tokens))["inputs"], expected, rtol=1e-6)
    named = bag_of_tokens(texts(name="words"), inputs="words", width=np.int64(2048))
    np.testing.assert_array_equal(named["inputs"], bag_of_tokens(texts())["inputs"])
    longest = [
        {**batch, "inputs": {k: v[:, : 9 - n] for k, v in batch["inputs"].items()}} for n, batch in enumerate(texts())
    ]
    short = MASK & (np.arange(9) < np.array([9, 9, 8, 8, 8])[:, None])
    np.testing.assert_allclose(bag_of_tokens(longest)["inputs"], counted(short, 2048), rtol=1e-6)
    unlabelled = [{"inputs": {"input_ids": TOKENS, "attention_mask": None}, "id": np.arange(5)}]
    assert bag_of_tokens(unlabelled).labels is None


def test_a_bag_of_tokens_names_what_does_not_fit():
    for width in (0, -3, 2.0, True, "8"):
        with pytest.raises(DataError, match=r"width is .*; expected a whole number of columns above 0"):
            bag_of_tokens(texts(), width=width)
    with pytest.raises(DataError, match=r"bag_of_tokens\(\) got no batch. Expected at least one"):
        bag_of_tokens([])
    with pytest.raises(DataError, match=r"the inputs are \(4, 5, 5, 2\) float32; expected a dict .* take raw_inputs"):
        bag_of_tokens(batches())
    held = r"a dict of attention_mask \(2, 9\) int32, input_ids \(2, 9\) int64; expected a dict with 'words'"
    with pytest.raises(DataError, match=held):
        bag_of_tokens(texts(), inputs="words")
    for tokens in (TOKENS.astype(np.float32), TOKENS[:, 0], TOKENS[..., None], TOKENS > 3):
        with pytest.raises(DataError, match=r"expected a dict with 'input_ids' \[B, T\] integers, as data.tokenizer"):
            bag_of_tokens(texts(tokens, None))
    for mask in (MASK[:, :8], MASK[:, 0], MASK[:, None]):
        with pytest.raises(DataError, match=r"attention_mask is .* int32; expected the shape of 'input_ids', \(2, 9\)"):
            bag_of_tokens(texts(mask=mask))


def test_raw_inputs_are_features_too():
    table = raw_inputs(batches())
    np.testing.assert_array_equal(table["inputs"], IMAGES.reshape(10, -1))
    assert table.labels.tolist() == [i % 3 for i in range(100, 110)]
    with pytest.raises(DataError, match=r"raw_inputs\(\) got no batch"):
        raw_inputs([])


def test_what_does_not_fit_is_named():
    with pytest.raises(DataError, match=r"extract\(\) got no batch"):
        extract(MODEL, [])
    with pytest.raises(DataError, match="a batch has inputs; expected a dict with 'inputs' and 'id'"):
        extract(MODEL, [{"inputs": IMAGES}])
    with pytest.raises(DataError, match="id 100 stands in the table 2 times"):
        extract(MODEL, [*batches(), *batches()])
    with pytest.raises(SelectionError, match="matched none"):
        extract(MODEL, batches(), at="blocks/*")
    with pytest.raises(SelectionError, match="this Model cannot say what its modules make: capture is None"):
        extract(MODEL._replace(capture=None), batches(), at="stem")
    scalar = tj.interop.pure(lambda params, x: x.sum((1, 2, 3)), {})
    with pytest.raises(SelectionError, match=r"'outputs' is \(4,\) float32; expected an array \[B, \.\.\., d\]"):
        extract(scalar, batches(), pool=mean_pool)
    named = tj.interop.pure(lambda params, x: {"a": x, "b": {"c": x}}, {})
    with pytest.raises(SelectionError, match=r"'outputs/b' is dict; expected .*\. Give a Model with such outputs"):
        extract(named, rows())
    marked = tj.interop.pure(lambda params, x: x + tj.interop.mark("total", x.sum(1))[:, None], {})
    with pytest.raises(SelectionError, match=r"'total' is \(4,\) float32; .*\. Narrow at to modules with one output"):
        extract(marked, rows(), at="total")


@pytest.mark.parametrize("name", ["outputs", "labels", "id", "weight"])
def test_a_module_does_not_take_the_place_of_something_else_in_the_table(name):
    model = tj.interop.pure(lambda params, x: 2 * tj.interop.mark(name, x), {})
    with pytest.raises(SelectionError, match=f"a module is called '{name}', which the table needs for something else"):
        extract(model, rows(), at=name)
    assert list(extract(model, rows()).arrays) == ["outputs"]


@pytest.mark.parametrize("function", [lambda given: extract(SEVERAL, given), raw_inputs, bag_of_tokens])
def test_rows_and_labels_belong_to_every_id(function):
    given = [*texts(mask=None)] if function is bag_of_tokens else rows()
    with pytest.raises(DataError, match=r"a batch has 5 ids and inputs \(\d, \d\) \w+; expected one row per id"):
        function([{**given[0], "id": np.arange(5)}])
    for part in given:
        some = [{k: v for k, v in batch.items() if batch is part or k != "labels"} for batch in given]
        with pytest.raises(DataError, match="some batches have labels and some have none; expected labels in all, or"):
            function(some)
