"""The minimum cut against scipy's maximum flow, and which of equal cuts is taken."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from transferjax import TransferError
from transferjax.program._cut import minimum_cut

NODES = 9
EDGES = st.lists(
    st.tuples(st.integers(0, NODES - 1), st.integers(0, NODES - 1), st.integers(0, 20)), min_size=1, max_size=40
)


def crossing(edges, side):
    return sum(capacity for tail, head, capacity in edges if tail in side and head not in side)


@hypothesis.given(EDGES)
def test_a_cut_weighs_what_flows_at_most(edges):
    edges = [edge for edge in edges if edge[0] != edge[1]]
    side = minimum_cut(edges, 0, NODES - 1)
    capacities = np.zeros((NODES, NODES), np.int32)
    for tail, head, capacity in edges:
        capacities[tail, head] += capacity
    assert 0 in side and NODES - 1 not in side
    assert crossing(edges, side) == maximum_flow(csr_array(capacities), 0, NODES - 1).flow_value


@hypothesis.given(EDGES)
def test_of_equal_cuts_it_is_the_one_nearest_the_sink(edges):
    """Every set of nodes that is a minimum cut lies within the one that is returned."""
    edges = [(a % 6, b % 6, c) for a, b, c in edges if a % 6 != b % 6]
    side = minimum_cut(edges, 0, 5)
    least = crossing(edges, side)
    for bits in range(16):
        other = {0, *(node for node in range(1, 5) if bits >> (node - 1) & 1)}
        assert crossing(edges, other) >= least
        assert crossing(edges, other) > least or other <= side


def test_what_is_never_cut_moves_the_cut():
    chain = [(0, 1, 10), (1, 2, 1), (2, 3, 4), (3, 4, 7)]
    assert minimum_cut(chain, 0, 4) == {0, 1}
    assert minimum_cut([*chain, (0, 2, None)], 0, 4) == {0, 1, 2}


def test_capacities_may_be_larger_than_32_bits():
    large = 2**40
    assert minimum_cut([(0, 1, large + 1), (1, 2, large), (0, 2, large)], 0, 2) == {0, 1}


def test_no_finite_cut():
    with pytest.raises(TransferError, match="no finite cut parts source and sink: a path of edges that are never cut"):
        minimum_cut([(0, 1, None), (1, 2, None)], 0, 2)
