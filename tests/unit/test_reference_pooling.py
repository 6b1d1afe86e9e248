"""Max pooling of one example after the other: winners, ties, overlap, sizes.

Oracles: torch's max_pool2d with its indices, windows counted one by one, sizes that the
authors of networks published. Winners are integers and compared exactly; routing an error
only copies and adds it, so gradients agree to 1e-12 of their norm.
"""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn import functional as F

from anybatch.reference import MaxPool2d, count_windows
from properties import seeded_examples

GEOMETRY = {
    "size": st.tuples(st.integers(1, 7), st.integers(1, 7)),
    "kernel": st.tuples(st.integers(1, 4), st.integers(1, 4)),
    "stride": st.tuples(st.integers(1, 4), st.integers(1, 4)),
    "padding": st.tuples(st.integers(0, 2), st.integers(0, 2)),
    "ceil_mode": st.booleans(),
}


def differences_from_torch(layer, x, error_seed=0):
    """Number of winners that differ, and the distance of the input errors."""
    output, stored = layer.forward(x, {})
    tensor = torch.tensor(x[np.newaxis], requires_grad=True)
    expected, indices = F.max_pool2d(
        tensor,
        layer.kernel,
        layer.stride,
        layer.padding,
        ceil_mode=layer.ceil_mode,
        return_indices=True,
    )
    np.testing.assert_array_equal(output, expected[0].detach().numpy())
    error = np.random.default_rng(error_seed).normal(size=output.shape)
    expected.backward(torch.tensor(error[np.newaxis]))
    right = tensor.grad[0].numpy()
    input_error, _ = layer.backward(stored, error, {})
    differing = int(np.sum(stored["winners"] != indices[0].numpy()))
    return differing, np.linalg.norm(input_error - right) / np.linalg.norm(right)


@seeded_examples(60)
@given(**GEOMETRY, levels=st.integers(1, 50), seed=st.integers(0, 99))
def test_pooling_of_any_geometry_agrees_with_torch_even_where_inputs_tie(
    size, kernel, stride, padding, ceil_mode, levels, seed
):
    assume(all(2 * p <= k for p, k in zip(padding, kernel, strict=True)))
    assume(all(n + 2 * p >= k for n, p, k in zip(size, padding, kernel, strict=True)))
    layer = MaxPool2d(kernel, stride, padding, ceil_mode)
    # Few levels make ties; all are negative, so padding with 0 would win.
    x = -np.random.default_rng(seed).integers(1, levels + 1, size=(2, *size)).astype(float)
    differing, distance = differences_from_torch(layer, x)
    assert differing == 0
    assert distance < 1e-12


class LastWins(MaxPool2d):
    def forward(self, x, parameters):
        output, stored = super().forward(x[:, ::-1, ::-1], parameters)
        last = x[0].size - 1 - stored["winners"][:, ::-1, ::-1]
        return output[:, ::-1, ::-1], stored | {"winners": last}


def test_the_comparison_with_torch_catches_a_tie_that_goes_to_the_last():
    differing, distance = differences_from_torch(LastWins(2), np.ones((1, 4, 4)))
    assert differing == 4  # each window
    assert distance > 0.01


def test_of_equal_inputs_the_first_in_row_major_order_wins():
    layer = MaxPool2d(3)
    x = np.array([[[0.0, 1.0, 5.0], [5.0, 5.0, 2.0], [5.0, 0.0, 5.0]]])
    _, stored = layer.forward(x, {})
    assert stored["winners"].tolist() == [[[2]]]
    input_error, _ = layer.backward(stored, np.array([[[7.0]]]), {})
    np.testing.assert_array_equal(input_error, [[[0, 0, 7], [0, 0, 0], [0, 0, 0]]])


def test_overlapping_windows_add():
    layer = MaxPool2d(2, stride=1)
    x = np.array([[[0.0, 1.0, 2.0], [3.0, 9.0, 4.0], [5.0, 6.0, 7.0]]])
    _, stored = layer.forward(x, {})
    error = np.array([[[1.0, 10.0], [100.0, 1000.0]]])
    input_error, _ = layer.backward(stored, error, {})
    np.testing.assert_array_equal(input_error, [[[0, 0, 0], [0, 1111, 0], [0, 0, 0]]])


def test_channels_have_winners_of_their_own():
    layer = MaxPool2d(2)
    x = np.array([[[9.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 9.0]]])
    _, stored = layer.forward(x, {})
    assert stored["winners"].ravel().tolist() == [0, 3]


def test_each_example_routes_its_error_to_its_own_winner_and_winners_add_up_to_the_batch():
    layer, batch_examples = MaxPool2d(2), 12
    inputs = np.random.default_rng(0).normal(size=(batch_examples, 1, 4, 4))
    winners = np.array([layer.forward(x, {})[1]["winners"] for x in inputs])
    for r, c in np.ndindex(2, 2):
        window = np.arange(16).reshape(4, 4)[layer.window(r, c)].ravel()
        counts = [int(np.sum(winners[:, 0, r, c] == index)) for index in window]
        assert sum(counts) == batch_examples
        assert sum(count > 0 for count in counts) > 1  # the batch has no single winner
    for x in inputs:
        _, stored = layer.forward(x, {})
        input_error, _ = layer.backward(stored, np.ones((1, 2, 2)), {})
        largest = [max(x[0][layer.window(r, c)].ravel()) for r, c in np.ndindex(2, 2)]
        np.testing.assert_array_equal(input_error, np.isin(x, largest))


def windows_counted_one_by_one(size, kernel, stride, padding, ceil_mode):
    """Place windows from the left until the padded input is used up."""
    count, start = 0, -padding
    while start + kernel <= size + padding:
        count, start = count + 1, start + stride
    covered = start - stride + kernel
    if ceil_mode and covered < size + padding and start < size:
        count += 1
    return count


SIZES = {
    "size": st.integers(1, 40),
    "kernel": st.integers(1, 7),
    "stride": st.integers(1, 7),
    "padding": st.integers(0, 3),
}


@seeded_examples(200)
@given(**SIZES, ceil_mode=st.booleans())
def test_the_number_of_windows_is_what_counting_them_gives(
    size, kernel, stride, padding, ceil_mode
):
    assume(2 * padding <= kernel <= size + 2 * padding)
    expected = windows_counted_one_by_one(size, kernel, stride, padding, ceil_mode)
    assert count_windows(size, kernel, stride, padding, ceil_mode) == expected


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "rounded_up", "rounded_down"),
    [
        (24, 2, 2, 0, 12, 12),  # LeNet, pool1
        (32, 3, 2, 0, 16, 15),  # Caffe's CIFAR-10, pool1
        (55, 3, 2, 0, 27, 27),  # AlexNet, pool1
        (112, 3, 2, 0, 56, 55),  # GoogLeNet, pool1
        (2, 2, 2, 1, 2, 2),  # nothing to round
        (3, 2, 2, 1, 2, 2),  # a third window would start in the right padding: dropped
    ],
)
def test_published_sizes_come_out(size, kernel, stride, padding, rounded_up, rounded_down):
    assert count_windows(size, kernel, stride, padding, ceil_mode=True) == rounded_up
    assert count_windows(size, kernel, stride, padding, ceil_mode=False) == rounded_down


def test_without_the_rule_a_last_window_would_lie_in_the_padding():
    size, kernel, stride, padding = 3, 2, 2, 1
    merely_rounded_up = -(-(size + 2 * padding - kernel) // stride) + 1
    assert merely_rounded_up == 3  # its start, 2 * 2 - 1 = 3, is behind the last input, 2
    assert F.max_pool2d(torch.zeros(1, 1, 3, 3), 2, 2, 1, ceil_mode=True).shape[-1] == 2


def test_padding_by_more_than_half_the_kernel_is_refused():
    with pytest.raises(ValueError, match="pads by more than half its kernel"):
        MaxPool2d(3, padding=2)


def test_a_window_larger_than_the_input_is_refused():
    with pytest.raises(ValueError, match=r"window larger than its padded input of \(2, 5\)"):
        MaxPool2d(3).forward(np.zeros((1, 2, 5)), {})
