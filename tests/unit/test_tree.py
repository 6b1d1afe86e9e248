"""Pairwise sums: one result, to the last bit, for every cut of the grains over ranges and ranks.

Oracle: the recursion S(a..b) = S(a..m) + S(m..b) written out, in NumPy. Bit for bit, so there is no
tolerance. Numbers span ten orders of magnitude and both signs, so that nearly every order of
summation has bits of its own; controls show that a running sum and an all-reduce do.
"""

import pickle
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from anybatch import distributed
from anybatch.gradient import pairwise_sum
from anybatch.gradient.pairwise_sum import Node, append_node, list_nodes, sum_nodes, sum_over_ranks
from anybatch.training.launch import launch

SHAPES = ((2, 3), (1,), (0,), (517,), (4, 5))
KINDS = (torch.float32, torch.float64, torch.float32, torch.float32, torch.bfloat16)
WORLDS = (1, 2, 3, 4)
NUM_GRAINS = (1, 2, 3, 7, 8, 13)
CUTS = {  # as shares of ranks, some empty; runs of grains
    1: lambda n: [n],
    2: lambda n: [n - n // 3, n // 3],
    3: lambda n: [n // 4, 0, n - n // 4],
    4: lambda n: [n // 4, n // 2 - n // 4, (3 * n) // 4 - n // 2, n - (3 * n) // 4],
}


def numbers(count, seed, dtype=np.float32):
    """Values of both signs and ten orders of magnitude."""
    random = np.random.default_rng(seed)
    return (random.standard_normal(count) * 10.0 ** random.integers(-5, 5, count)).astype(dtype)


def recursion(values):
    """S by its definition."""
    if len(values) == 1:
        return values[0]
    half = 1 << ((len(values) - 1).bit_length() - 1)
    return recursion(values[:half]) + recursion(values[half:])


def bits(value):
    return np.asarray(value).tobytes()


def runs_of(sizes):
    ends = np.cumsum(sizes).tolist()
    return [(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def stream_nodes(values, run, plus=lambda left, right: left + right):
    """Append the grains of a range one at a time; return the nodes, and their largest number."""
    nodes, most = [], 0
    for grain in range(*run):
        nodes = append_node(nodes, Node(grain, 0, values[grain]), plus)
        most = max(most, len(nodes))
    return nodes, most


@given(st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_a_stream_has_the_bits_of_the_recursion_and_few_nodes(count, seed):
    values = numbers(count, seed)
    nodes, most = stream_nodes(values, (0, count))
    assert bits(sum_nodes(nodes, np.add)) == bits(recursion(values))
    assert most <= count.bit_length()  # floor(log2 n) + 1


@given(st.lists(st.integers(0, 20), min_size=1, max_size=12), st.integers(0, 2**32 - 1))
def test_no_cut_changes_a_bit(sizes, seed):
    count = sum(sizes)
    if not count:
        sizes, count = [1], 1
    values = numbers(count, seed)
    contents = [stream_nodes(values, run)[0] for run in runs_of(sizes)]
    result = sum_nodes([node for nodes in contents for node in nodes], np.add)
    assert bits(result) == bits(recursion(values))


@given(st.integers(0, 200), st.integers(0, 200))
def test_a_run_comes_to_its_largest_aligned_subtrees(first, length):
    run = (first, first + length)
    spans = [(node.first, node.first + 2**node.level) for node in list_nodes(run)]
    assert [grain for span in spans for grain in range(*span)] == list(range(*run))
    for node in list_nodes(run):
        assert node.first % 2**node.level == 0
        above = node.first - node.first % 2 ** (node.level + 1)  # of the node that it is a half of
        assert not (run[0] <= above and above + 2 ** (node.level + 1) <= run[1])
    assert len(spans) <= 2 * max(1, length.bit_length())


def test_a_running_sum_has_other_bits_and_depends_on_the_cut():
    """Control."""
    other, cut = 0, 0
    for seed in range(100):
        values = numbers(16, seed)
        running = np.add.accumulate(values)[-1]
        halves = np.add.accumulate(values[:8])[-1] + np.add.accumulate(values[8:])[-1]
        other += bits(running) != bits(recursion(values))
        cut += bits(running) != bits(halves)
    assert min(other, cut) > 50


def test_negative_zeros_stay_as_they_are():
    zero = torch.tensor([-0.0])
    nodes, _ = stream_nodes([[zero.clone()] for _ in range(5)], (0, 5), pairwise_sum.add_lists)
    assert torch.signbit(sum_nodes(nodes, pairwise_sum.add_lists)[0])
    assert not torch.signbit(torch.zeros(1) + zero)  # the control: a sum that begins with 0


def test_a_long_sum_is_more_accurate_than_a_running_one():
    values = np.abs(numbers(2**14, 0))
    truth = np.sum(values.astype(np.float64))
    pairwise = abs(sum_nodes(stream_nodes(values, (0, len(values)))[0], np.add) - truth)
    assert pairwise < 0.1 * abs(np.add.accumulate(values)[-1] - truth)


def grain(index):
    """Return the gradient of one grain: tensors of several shapes and types."""
    flat = torch.from_numpy(numbers(600, index, np.float64))
    return [
        flat[: int(np.prod(shape))].reshape(shape).to(kind)
        for shape, kind in zip(SHAPES, KINDS, strict=True)
    ]


def total(runs, rank, group):
    """Return the sum over ranks, and the all-reduce of running sums."""
    nodes, running = [], [torch.zeros_like(tensor) for tensor in grain(0)]
    for index in range(*runs[rank]):
        nodes = append_node(nodes, Node(index, 0, grain(index)), pairwise_sum.add_lists)
        pairwise_sum.add_lists(running, grain(index))
    distributed.all_reduce_sum(running, group)
    return [t.clone() for t in sum_over_ranks(nodes, runs, grain(0), group)], running


def work(group):
    """Return the sums of this rank by number of ranks and of grains."""
    rank, results = distributed.get_rank(group), {}
    pairwise_sum.BUCKET_BYTES = 1500  # several buckets, also of one type
    for world in WORLDS:
        local = dist.new_group(list(range(world)))
        for count in NUM_GRAINS if rank < world else ():
            results[world, count] = total(runs_of(CUTS[world](count)), rank, local)
    return pickle.dumps(results)


@pytest.fixture(scope="module")
def results():
    """Return the sums over real processes, by rank."""
    return list(map(pickle.loads, launch(partial(work), 4, imports=["test_tree"])))


def truths(count):
    """Sum by the recursion; NumPy does not know the narrow types, so torch adds them."""
    columns = zip(*(grain(index) for index in range(count)), strict=True)
    return [recursion(list(column)) for column in columns]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("count", NUM_GRAINS)
def test_ranks_have_the_bits_of_the_recursion_over_all_grains(results, world, count):
    for rank in range(world):
        for result, expected in zip(results[rank][world, count][0], truths(count), strict=True):
            assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
            assert torch.equal(result.view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.parametrize("world", [3, 4])
def test_an_all_reduce_of_running_sums_has_other_bits(results, world):
    """Control."""
    _, running = results[0][world, 13]
    assert not torch.equal(running[3], truths(13)[3])
    torch.testing.assert_close(running[3], truths(13)[3], rtol=1e-3, atol=1e-3)
