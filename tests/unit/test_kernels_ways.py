"""Every way in which products and convolutions come to their figures comes to the same.

Oracle: torch.autograd, one example at a time, in float64. Tolerance: 1e-10 of the norm, some
thousand times the rounding of sums of this length; Gram matrices square it before it shows.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from anybatch.kernels import choice as kernels
from anybatch.ledger.contractions.convolution import Correlation, _Settings, square_by_pixels
from anybatch.ledger.contractions.linear import Product

BOUND = 1e-10
seeded = settings(
    derandomize=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class FakeChoice:
    """Replacement of a measurement: choose the way of a number, and record the names."""

    def __init__(self) -> None:
        self.number = 0
        self.names: set[str] = set()

    def __call__(self, ways: Mapping[str, Callable[[], Any]]) -> str:
        name = list(ways)[self.number % len(ways)]
        self.names.add(name)
        return name

    def each(self) -> Iterator[None]:
        """Forget all choices for every number in turn, as in a new process."""
        for self.number in (0, 1, 2):
            kernels.choices.clear()
            yield


@pytest.fixture(name="choice")
def choose(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeChoice]:
    """No product is too small for a choice, none is measured, and none remembered."""
    choice = FakeChoice()
    monkeypatch.setattr(kernels, "_read", dict)
    monkeypatch.setattr(kernels, "write_choices", lambda name, choices: None)
    monkeypatch.setattr(kernels, "SMALL", 1)
    monkeypatch.setattr(kernels, "_measure", choice)
    kernels.use("fastest")
    yield choice
    kernels.use("torch")
    kernels.choices.clear()


class Expected(NamedTuple):
    """Gradients of B examples, each alone."""

    gradients: Tensor
    c: Tensor
    direction: Tensor

    @classmethod
    def of(cls, weight: Tensor, outputs: list[Tensor], d: Tensor) -> "Expected":
        each = [
            torch.autograd.grad(y, weight, g)[0].detach() for y, g in zip(outputs, d, strict=True)
        ]
        return cls(torch.stack(each), torch.rand(len(d)).double(), torch.randn_like(each[0]))

    def check(self, use: Product | Correlation) -> None:
        """Whatever it can tell."""
        g, flat = self.gradients, self.gradients.flatten(1)
        squares = flat.square().sum(1)
        assert error(use.gradients(), g) < BOUND
        assert error(use.square_norms(), squares) < BOUND
        assert error(use.dot(self.direction), flat @ self.direction.flatten()) < BOUND
        for c in (None, self.c):
            expected = g.sum(0) if c is None else torch.tensordot(c, g, 1)
            assert error(use.sum_gradients(c), expected) < BOUND
            total, square = use.sum_and_square(c)
            assert error(total, expected) < BOUND
            assert error(square, squares) < BOUND
        assert error(use.compact().square_norms(), squares) < BOUND
        assert error(use.compact().sum_gradients(self.c), torch.tensordot(self.c, g, 1)) < BOUND


def error(result: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm."""
    assert result.shape == expected.shape
    return float((result - expected).norm() / expected.norm().clamp(min=1e-30))


@seeded
@given(*(st.integers(1, high) for high in (4, 7, 9, 9)), st.booleans(), st.integers(0, 2**20))
def test_products(
    choice: FakeChoice, size: int, t: int, d: int, p: int, is_transposed: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    a, back = torch.randn(size, t, d).double(), torch.randn(size, t, p).double()
    weight = torch.randn(*((d, p) if is_transposed else (p, d))).double().requires_grad_()
    outputs = [x @ (weight if is_transposed else weight.T) for x in a]
    expected = Expected.of(weight, outputs, back)
    for _ in choice.each():
        expected.check(Product(a, back, is_transposed))
        apart = a.transpose(0, 1).contiguous().transpose(0, 1)  # the same, elsewhere in memory
        expected.check(Product(apart, back, is_transposed))


def test_products_of_many_ways_have_taken_them_all(choice: FakeChoice) -> None:
    for t in (2, 40):
        for _ in choice.each():
            use = Product(torch.randn(3, t, 20), torch.randn(3, t, 20), False)
            use.sum_and_square(None), use.square_norms()
    assert choice.names == {"blocks", "apart", "gram", "torch", "onednn"}


def test_squares_of_rows_are_not_those_of_the_sum() -> None:  # the control
    a, d = torch.randn(3, 2, 5), torch.randn(3, 2, 4)
    wrong = (a.square().sum(2) * d.square().sum(2)).sum(1)  # without terms of two rows
    assert error(Product(a, d, False).square_norms(), wrong) > 0.01


MOVES: dict[int, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    1: (F.conv1d, F.conv_transpose1d),
    2: (F.conv2d, F.conv_transpose2d),
    3: (F.conv3d, F.conv_transpose3d),
}


class Case(NamedTuple):
    """A convolution of B examples with T images each."""

    weight: Tensor
    use: Correlation
    outputs: list[Tensor]


def make_case(
    n: int, size: int, images: int, numbers: list[int], is_transposed: bool, groups: int
) -> Case:
    """Make a convolution with random inputs, kernel and gradients."""
    kernel, stride, padding, dilation, extra, channels, outputs = numbers
    c, k = groups * channels, groups * outputs
    shape = (c, k // groups) if is_transposed else (k, c // groups)
    weight = torch.randn(*shape, *[kernel] * n).double().requires_grad_()
    reach = dilation * (kernel - 1) + 1
    x = torch.randn(size, images, c, *range(reach + extra, reach + extra + n)).double()
    more: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    out = (stride > 1) * is_transposed
    if is_transposed:
        more["output_padding"] = out
    move = MOVES[n][is_transposed]
    y = [move(one, weight, None, groups=groups, **more) for one in x]
    how = _Settings(
        tuple(weight.shape),
        *((value,) * n for value in (stride, padding, dilation)),
        is_transposed,
        (out,) * n,
        groups,
    )
    d = torch.randn(len(y), *y[0].shape).double()
    return Case(weight, Correlation(x, d, how), y)


@seeded
@given(
    *(st.integers(1, high) for high in (3, 3, 2)),
    st.tuples(
        *(st.integers(1, 3), st.integers(1, 3), st.integers(0, 1), st.integers(1, 2)),
        *(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    ),
    st.booleans(),
    st.integers(1, 2),
    st.integers(0, 2**20),
)
def test_convolutions(
    choice: FakeChoice,
    n: int,
    size: int,
    images: int,
    numbers: tuple[int, ...],
    is_transposed: bool,
    groups: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    case = make_case(n, size, images, list(numbers), is_transposed, groups)
    expected = Expected.of(case.weight, case.outputs, case.use.d)
    for _ in choice.each():
        expected.check(case.use)
    if images == 1:
        how = case.use.settings
        image, rows = (t[:, 0] for t in case.use._sides)
        moves = how.shape[2:], how.stride, how.padding, how.dilation, how.groups
        squares = expected.gradients.flatten(1).square().sum(1)
        assert error(square_by_pixels(image, rows, *moves), squares) < BOUND
        wrong = image.flatten(1).square().sum(1) * rows.flatten(1).square().sum(1)  # the control
        if how.shape[2:] != (1,) * n:
            assert error(wrong, squares) > 0.01


def test_convolutions_of_many_ways_have_taken_them_all(choice: FakeChoice) -> None:
    for _ in choice.each():
        use = make_case(2, 3, 1, [3, 1, 1, 1, 1, 30, 30], False, 1).use
        use.sum_and_square(None), use.square_norms()
    assert choice.names == {"images", "apart", "gram"}


@pytest.mark.parametrize("moves", [[3, 1, 0, 1], [2, 2, 1, 1], [3, 2, 1, 2]])
def test_images_that_are_small_unfolded_are_met_as_a_product(
    choice: FakeChoice, moves: list[int]
) -> None:
    case = make_case(2, 3, 1, [*moves, 4, 1, 30], False, 1)
    expected = Expected.of(case.weight, case.outputs, case.use.d)
    for _ in choice.each():
        expected.check(case.use)
    assert "unfolded" in choice.names


def test_more_examples_than_are_taken_at_once(choice: FakeChoice) -> None:
    case = make_case(2, 260, 1, [3, 1, 1, 1, 1, 1, 2], False, 1)  # 256 at most
    Expected.of(case.weight, case.outputs, case.use.d).check(case.use)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_types_keep_squares_in_float32_and_use_no_gram(
    choice: FakeChoice, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    a, d = torch.randn(3, 4, 40).to(dtype), torch.randn(3, 4, 50).to(dtype)
    squares = Product(a, d, False).sum_and_square(None)[1]
    x, y = torch.randn(3, 1, 30, 4, 4).to(dtype), torch.randn(3, 1, 30, 4, 4).to(dtype)
    how = _Settings((30, 30, 3, 3), (1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    convolved = Correlation(x, y, how).sum_and_square(None)[1]
    assert squares.dtype == convolved.dtype == torch.float32
    is_narrow = dtype == torch.bfloat16
    assert bool({"apart", "gram", "blocks"} & choice.names) is not is_narrow
    tolerance = 2e-2 if is_narrow else 1e-5  # bfloat16 has 8 bits: each g_i is rounded to 0.4 %
    exact = Product(a.double(), d.double(), False).square_norms()
    assert error(squares.double(), exact) < tolerance
