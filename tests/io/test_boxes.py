"""Boxes: numpy's own indexing is the reference."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transferjax._errors import CheckpointError
from transferjax.io._boxes import block_count, block_shape, blocks, c_strides, normalise, raw, read_box
from transferjax.io._bytes import MemoryBytes

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def indexed(draw):
    shape = draw(shapes)
    whole = st.slices(6)
    parts = [draw(whole if n == 0 else st.one_of(whole, st.integers(-n, n - 1))) for n in shape]
    cut = draw(st.integers(0, len(parts)))
    if draw(st.booleans()):
        parts[cut:] = [...]
    return shape, tuple(parts[: cut + 1])


@given(indexed())
def test_a_box_and_its_inner_index_equal_the_index(case):
    shape, index = case
    array = np.arange(np.prod(shape)).reshape(shape)
    low, high, inner = normalise(index, shape, "w")
    box = array[tuple(slice(a, b) for a, b in zip(low, high))]
    np.testing.assert_array_equal(box[inner], array[index])
    assert box.size <= max(array.size, 1)


@given(shapes, st.permutations(range(4)), st.data())
def test_a_box_of_any_strides_equals_numpy(shape, order, data):
    array = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    axes = [a for a in order if a < array.ndim]
    low = tuple(data.draw(st.integers(0, n)) for n in shape)
    high = tuple(data.draw(st.integers(a, n)) for a, n in zip(low, shape))
    # The same elements laid out in another order of axes, some bytes into a buffer.
    laid = np.ascontiguousarray(array.transpose(axes))
    strides = [0] * array.ndim
    for axis, stride in zip(axes, c_strides(laid.shape, 2)):
        strides[axis] = stride
    source = MemoryBytes(b"??" + laid.tobytes(), "memory")
    found = read_box(source, array.dtype, 2, tuple(strides), low, high)
    np.testing.assert_array_equal(found, array[tuple(slice(a, b) for a, b in zip(low, high))])
    assert found.flags.c_contiguous and found.flags.owndata


def test_only_what_a_box_needs_is_read():
    reads = []

    class Counting(MemoryBytes):
        def read_into(self, offset, out):
            reads.append((offset, len(out)))
            super().read_into(offset, out)

    array = np.arange(4 << 17, dtype=np.uint8).reshape(4, 1 << 17)
    source = Counting(array.tobytes(), "memory")
    np.testing.assert_array_equal(read_box(source, array.dtype, 0, (1 << 17, 1), (1, 0), (3, 4)), array[1:3, :4])
    assert reads == [(1 << 17, 4), (2 << 17, 4)]
    reads.clear()
    read_box(source, array.dtype, 0, (1 << 17, 1), (1, 0), (3, 1 << 17))
    assert reads == [(1 << 17, 2 << 17)]


def test_a_box_outside_its_bytes():
    with pytest.raises(CheckpointError, match="memory is truncated or damaged: expected 12 bytes at position 0"):
        read_box(MemoryBytes(bytes(8), "memory"), np.dtype("f4"), 0, (4,), (0,), (3,))


def test_strides_that_do_not_fit_the_elements():
    with pytest.raises(CheckpointError, match=r"strides \(3,\) do not fit the element size"):
        read_box(MemoryBytes(bytes(80), "memory"), np.dtype("f4"), 0, (3,), (0,), (4,))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ((0, 0, 0), r"has too many parts for 'w', which has shape \(2, 3\)"),
        ((..., ...), "has too many parts for 'w'"),
        (2, r"index 2 is outside 'w', which has shape \(2, 3\)"),
        ((0, -4), "index -4 is outside 'w'"),
        (True, "index True is outside 'w'"),
        ("a", "'w' cannot be indexed by str. Expected integers, slices"),
        (None, "'w' cannot be indexed by NoneType"),
        (([0, 1],), "'w' cannot be indexed by list"),
    ],
)
def test_indices_that_are_none(index, message):
    with pytest.raises(CheckpointError, match=message):
        normalise(index, (2, 3), "w")


@given(shapes, st.integers(1, 300))
def test_blocks_cover_every_element_once(shape, limit):
    array = np.zeros(shape, np.int32)
    block = block_shape(shape, 4, limit)
    numbers = []
    for number, low, high in blocks(shape, block, (0,) * len(shape), shape):
        part = array[(*(slice(a, b) for a, b in zip(low, high)), ...)]
        part += 1
        numbers.append(number)
        assert part.nbytes <= max(limit, 4)
    assert (array == 1).all()
    assert numbers == list(range(block_count(shape, block)))


def test_a_block_is_contiguous():
    assert block_shape((100, 50, 4), 4, 1 << 20) == (100, 50, 4)
    assert block_shape((100, 50, 4), 4, 3) == (1, 1, 1)
    assert block_shape((), 4, 16) == ()


def test_raw_shares_memory():
    array = np.zeros((2, 2), np.int16)
    raw(array)[0] = 7
    assert array[0, 0] == 7 and len(raw(np.empty((0, 3)))) == 0
