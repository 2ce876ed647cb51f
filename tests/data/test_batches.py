import itertools
import json

import numpy as np
import pytest

from transferjax import _errors
from transferjax._types import Preprocess
from transferjax.data import CorruptExampleError, arrays, batches, image_folder, open


def ids(iterable):
    return [batch["id"].tolist() for batch in iterable]


def flat(iterable):
    return [number for batch in iterable for number in batch["id"].tolist()]


def same(first, second):
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
            assert a[name].dtype == b[name].dtype


def test_a_batch_has_inputs_labels_and_ids(ten):
    batch = next(iter(batches(ten, 4, shuffle=False)))
    assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
        "inputs": ((4, 4, 4, 1), "uint8"),
        "labels": ((4,), "int32"),
        "id": ((4,), "int64"),
    }
    assert batch["inputs"][:, 0, 0, 0].tolist() == batch["id"].tolist() == [0, 1, 2, 3]


def test_the_seed_alone_determines_the_order(ten):
    assert ids(batches(ten, 5, seed=3, epochs=4)) == ids(batches(ten, 5, seed=3, epochs=4, threads=3))
    orders = {tuple(flat(batches(ten, 5, seed=seed))) for seed in range(20)}
    assert len(orders) == 20


@pytest.mark.parametrize("threads", [0, 2])
def test_every_epoch_is_a_permutation_of_its_own(ten, threads):
    order = flat(batches(ten, 5, seed=0, epochs=6, threads=threads))
    epochs = [tuple(order[start : start + 10]) for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == 6


def test_neighbouring_seeds_share_no_epoch(ten):
    epochs = [
        tuple(order[start : start + 10])
        for seed in (0, 1, 2)
        for order in [flat(batches(ten, 10, seed=seed, epochs=4))]
        for start in range(0, 40, 10)
    ]
    assert len(set(epochs)) == 12


def test_the_remainder_is_dropped_or_kept_in_every_epoch(ten):
    dropped = batches(ten, 4, seed=0, epochs=2)
    assert (len(dropped), dropped.steps_per_epoch) == (4, 2)
    assert [len(batch) for batch in ids(dropped)] == [4, 4, 4, 4]
    kept = batches(ten, 4, seed=0, epochs=2, drop_remainder=False)
    assert (len(kept), kept.steps_per_epoch) == (6, 3)
    assert [len(batch) for batch in ids(kept)] == [4, 4, 2, 4, 4, 2]
    assert sorted(flat(kept)[:10]) == list(range(10))


def test_without_shuffling_the_order_is_the_source_s(ten):
    assert flat(batches(ten.subset([3, 1, 2]), 3, shuffle=False, epochs=2)) == [3, 1, 2, 3, 1, 2]


def test_iterating_again_starts_again(ten):
    some = batches(ten, 2, seed=0)
    first = ids(some)
    next(iter(some))
    assert ids(some) == first
    assert repr(some) == "Batches(arrays: 5 of 2, 1 epochs of 5)"


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("position", [0, 1, 4, 5, 7, 14, 15])
def test_resuming_gives_the_same_bits(ten, position, threads):
    whole = batches(ten, 2, seed=9, epochs=3, threads=threads)
    everything = list(whole)
    running = iter(whole)
    for _ in range(position):
        next(running)
    state = json.loads(json.dumps(whole.get_state()))
    again = batches(ten, 2, seed=9, epochs=3, threads=threads)
    again.set_state(state)
    assert again.get_state() == state
    same(list(again), everything[position:])
    same(list(again), everything)


def test_a_state_may_be_resumed_with_more_epochs(ten):
    short = batches(ten, 5, seed=0, epochs=1)
    list(short)
    longer = batches(ten, 5, seed=0, epochs=3)
    longer.set_state(short.get_state())
    assert ids(longer) == ids(batches(ten, 5, seed=0, epochs=3))[2:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "the state was taken with seed 0, but these batches have 1"),
        ({"batch_size": 5}, "taken with batch_size 2, but these batches have 5"),
        ({"shuffle": False}, "taken with shuffle True, but these batches have False"),
        ({"drop_remainder": False}, "taken with drop_remainder True, but these batches have False"),
    ],
)
def test_a_state_of_other_batches_raises(ten, change, message):
    state = batches(ten, 2, seed=0).get_state()
    with pytest.raises(_errors.DataError, match=message):
        batches(ten, **{"batch_size": 2, "seed": 0, **change}).set_state(state)


def test_a_state_of_other_data_or_of_nothing_raises(ten):
    some = batches(ten, 2, seed=0, epochs=2)
    with pytest.raises(_errors.DataError, match="the state was taken with fingerprint '"):
        batches(ten.take(8), 2, seed=0).set_state(some.get_state())
    with pytest.raises(_errors.DataError, match=r"no state of batches: 'position' is missing. Use the value of get_st"):
        some.set_state({})
    with pytest.raises(_errors.DataError, match=r"the state is at batch 10, but there are 5. Raise epochs."):
        list(some)
        batches(ten, 2, seed=0).set_state(some.get_state())


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_every_batch(ten, count):
    source = ten.take(8)
    alone = ids(batches(source, 4, seed=0, epochs=3))
    parts = [ids(batches(source, 4, seed=0, epochs=3, process_index=p, process_count=count)) for p in range(count)]
    assert [list(itertools.chain(*step)) for step in zip(*parts)] == alone
    for start in (0, 2, 4):
        epoch = [number for part in parts for batch in part[start : start + 2] for number in batch]
        assert sorted(epoch) == list(range(8))


def test_processes_that_cannot_share_raise(ten):
    with pytest.raises(_errors.DataError, match="a batch of 5 cannot be shared out equally among 2 processes"):
        batches(ten, 5, seed=0, process_index=0, process_count=2)
    with pytest.raises(_errors.DataError, match="process_index is 2; expected 0 to 1 for 2 processes"):
        batches(ten, 4, seed=0, process_index=2, process_count=2)
    with pytest.raises(_errors.DataError, match=r"last batch of arrays has 2 examples, which 4 .* source.take\(8\)"):
        batches(ten, 8, seed=0, drop_remainder=False, process_index=0, process_count=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0, "seed": 0}, "batch_size is 0; expected a whole number of at least 1"),
        ({"batch_size": 2, "seed": 0, "epochs": 0}, "epochs is 0; expected a whole number of at least 1"),
        ({"batch_size": 2}, r"shuffling needs a seed: pass seed=0 \(any number\), or shuffle=False"),
        ({"batch_size": 2, "seed": -1}, "seed is -1; expected 0 to 4294967295"),
        ({"batch_size": 2, "seed": 0, "on_error": "ignore"}, "on_error is 'ignore'; expected 'raise' or 'skip'"),
        ({"batch_size": 11, "seed": 0}, "a batch of 11 is larger than the data: arrays has 10 examples"),
        ({"batch_size": 2, "seed": 0, "size": 8, "preprocess": Preprocess((8, 8), interpolation="x")}, "'x' is no int"),
    ],
)
def test_arguments_that_do_not_fit_raise(ten, options, message):
    with pytest.raises(_errors.DataError, match=message):
        batches(ten, **options)


def test_a_large_batch_is_fine_for_evaluation(ten):
    assert [len(batch) for batch in ids(batches(ten, 64, shuffle=False, drop_remainder=False))] == [10]


def test_no_data_raises(ten):
    with pytest.raises(_errors.DataError, match="arrays is empty"):
        batches(ten.subset([]), 1, seed=0)


@pytest.mark.parametrize("threads", [0, 2])
def test_a_label_outside_the_classes_names_the_id(threads):
    source = arrays(np.zeros((4, 2, 2), np.uint8), [0, 1, 7, 1], ids=[10, 11, 12, 13])
    with pytest.raises(_errors.DataError, match=r"id 12 has label 7; expected 0 to 1"):
        list(batches(source, 2, seed=0, threads=threads, num_classes=2))
    with pytest.raises(_errors.DataError, match=r"id 11 has label 1; expected 0 to 0"):
        list(batches(source.take(2), 2, shuffle=False, num_classes=1))


def test_images_of_several_sizes_need_a_size(folder):
    source = image_folder(folder)
    with pytest.raises(_errors.DataError, match=r"not known to have one size. Pass size=\(height, width\), or prep"):
        batches(source, 4, seed=0)
    assert next(iter(batches(source, 4, seed=0, size=5)))["inputs"].shape == (4, 5, 5, 3)
    spec = Preprocess((3, 7), interpolation="bilinear")
    assert next(iter(batches(source, 4, seed=0, preprocess=spec)))["inputs"].shape == (4, 3, 7, 3)
    assert next(iter(batches(source, 4, seed=0, preprocess=spec, size=2)))["inputs"].shape == (4, 2, 2, 3)


def test_the_host_shrinks_but_never_enlarges(ten):
    assert next(iter(batches(ten, 2, seed=0, size=96)))["inputs"].shape == (2, 4, 4, 1)
    assert next(iter(batches(ten, 2, seed=0, size=2)))["inputs"].shape == (2, 2, 2, 1)


def test_decoded_images_are_kept_while_they_are_small(folder):
    source = image_folder(folder)
    list(batches(source, 4, seed=0, size=4))
    assert len(source.decoded) == 12
    for file in folder.rglob("*.png"):
        file.write_bytes(b"")
    assert len(flat(batches(source, 4, seed=1, size=4, epochs=2))) == 24


def test_without_a_cache_nothing_is_kept(folder):
    source = image_folder(folder)
    list(batches(source, 4, seed=0, size=4, cache_bytes=100))
    assert not source.decoded


@pytest.mark.parametrize("threads", [0, 2])
def test_a_corrupt_image_stops_the_run_unless_it_is_to_be_skipped(folder, threads):
    (folder / "cat" / "3.png").write_bytes(b"damaged")
    (folder / "dog" / "1.png").write_bytes(b"")
    source = image_folder(folder)
    with pytest.raises(CorruptExampleError, match=r"(cat/3|dog/1)\.png \(id [37]\) cannot be decoded"):
        list(batches(source, 2, seed=0, size=4, threads=threads))
    some = batches(source, 2, seed=0, size=4, epochs=2, on_error="skip", threads=threads)
    assert sorted(some.skipped) == [3, 7]
    assert some.steps_per_epoch == 5
    assert sorted(flat(some)[:10]) == [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]


def test_nothing_skipped_when_nothing_is_corrupt(ten):
    assert batches(ten, 2, seed=0, on_error="skip").skipped == ()


def test_only_corrupt_images_leave_nothing(folder):
    for file in folder.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(_errors.DataError, match="is empty: expected at least one example"):
        batches(image_folder(folder), 2, seed=0, size=4, on_error="skip")


def test_data_without_images(ten):
    tokens = {"tokens": np.arange(12).reshape(4, 3), "mask": np.ones((4, 3), bool)}
    batch = next(iter(batches(arrays(tokens, [0, 1, 0, 1]), 2, shuffle=False)))
    assert batch["inputs"]["tokens"].tolist() == [[0, 1, 2], [3, 4, 5]]
    vectors = np.ones((4, 3), np.float32)
    batch = next(iter(batches(arrays(vectors, np.eye(4)), 2, shuffle=False)))
    assert batch["inputs"].shape == (2, 3)
    assert (batch["labels"].shape, batch["labels"].dtype) == ((2, 4), np.float32)


def test_images_that_differ_in_spite_of_their_records_are_named():
    images = np.empty(2, object)
    images[:] = [np.zeros((2, 2)), np.zeros((3, 2))]
    with pytest.raises(_errors.DataError, match=r"'inputs' differs in shape between examples: \(2, 2\) .* and \(3"):
        list(batches(arrays(images, [0, 1]), 2, shuffle=False))


def test_text_and_unknown_features_raise(ten):
    with pytest.raises(_errors.DataError, match=r"'inputs' holds text \(<U1\); expected numbers. Encode it first."):
        list(batches(arrays(np.array(["a", "b"]), [0, 1]), 2, seed=0))
    with pytest.raises(_errors.DataError, match=r"arrays has no feature 'lable'. Nearest: label"):
        list(batches(ten, 2, seed=0, keep=("lable",)))


def test_a_slice_of_the_sample_goes_through_grain_threads():
    source = open("sample", "train[:64]")
    same(list(batches(source, 16, seed=0, threads=2)), list(batches(source, 16, seed=0)))


def test_a_name_is_no_source():
    with pytest.raises(_errors.DataError, match=r"batches\(\) expects a Source first, got str: write tj.data.open"):
        batches("sample", 2, seed=0)
