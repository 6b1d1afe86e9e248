"""Every layer's per-example figures, over generated shapes.

Oracle: `ledger_cases.one_at_a_time`, plain autograd of each example alone: squares, gradients, sums
with weights c, and inner products. Tolerance: `ledger_cases.BOUND`.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from ledger_cases import BOUND, assert_as_one_at_a_time, observe_figures, one_at_a_time, worst
from properties import seeded_examples


class Case(NamedTuple):
    """A model, and the shape of an example's input, which may depend on a length."""

    build: Callable[[], nn.Module]
    shape: Callable[[int], tuple[int, ...]] = lambda t: (4,)
    num_ids: int | None = None  # inputs are indices below it


class Call(nn.Module):
    """Parameters, and a function of them and of the input."""

    def __init__(self, forward: Callable[..., Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = forward
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def rows(*outer: int) -> Callable[[int], tuple[int, ...]]:
    return lambda t: (*outer, t, 4)


def image(channels: int, dims: int) -> Callable[[int], tuple[int, ...]]:
    return lambda t: (channels, *([t + 5] * dims))


def set_first(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = model.p
    return x * 2


def set_masked(model: nn.Module, x: Tensor) -> Tensor:
    mask = x.mean(-1) > 0.1
    x = x * 1
    x[mask] = model.p
    return x * 2


def in_place(model: nn.Module, x: Tensor) -> Tensor:
    h = x * 1.5
    h += model.p
    h.mul_(model.w)
    return h.sub_(model.p)


def transpose_output(x: Tensor) -> Tensor:
    """[B, T, d] to [T B, d]."""
    return x.transpose(0, 1).flatten(0, 1)


def bags(model: nn.Module, ids: Tensor) -> Tensor:
    """Make bags of several lengths, some empty, with weights."""
    sizes = ids[:, 0] % (ids.shape[1] + 1)
    flat = torch.cat([row[:n] for row, n in zip(ids, sizes.tolist(), strict=True)])
    weights = 1 + 0.1 * flat.to(model.p.dtype)
    offsets = sizes.cumsum(0) - sizes
    return F.embedding_bag(flat, model.p, offsets, mode="sum", per_sample_weights=weights)


LAYERS: dict[str, Case] = {
    "linear 2-D": Case(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))),
    "linear 3-D": Case(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), rows()),
    "linear 4-D, no bias": Case(lambda: nn.Linear(4, 3, bias=False), rows(2)),
    "linear 5-D": Case(lambda: nn.Linear(4, 3), rows(2, 3)),
    "addmm": Case(lambda: Call(lambda m, x: torch.addmm(m.b, x, m.w), b=(3,), w=(4, 3))),
    "addmm, beta and alpha": Case(
        lambda: Call(lambda m, x: torch.addmm(m.b, x, m.w, beta=2, alpha=3), b=(3,), w=(4, 3))
    ),
    "matmul": Case(
        lambda: Call(lambda m, x: torch.tanh(x @ m.w) @ m.v.T, w=(4, 3), v=(2, 3)), rows()
    ),
    "matmul from the left": Case(lambda: Call(lambda m, x: m.w @ x.mT, w=(3, 4)), rows()),
    "matmul of stacks": Case(
        lambda: Call(lambda m, x: torch.matmul(x[:, None], m.w), w=(2, 4, 3)), rows()
    ),
    "matrix times vector": Case(lambda: Call(lambda m, x: x @ m.w, w=(4,)), rows()),
    "bmm": Case(
        lambda: Call(lambda m, x: torch.bmm(x, m.w.expand(len(x), -1, -1)), w=(4, 3)), rows()
    ),
    "outer": Case(lambda: Call(lambda m, x: torch.outer(x[:, 0], m.w), w=(3,))),
    "einsum": Case(lambda: Call(lambda m, x: torch.einsum("bi,ij->bj", x, m.w), w=(4, 3))),
    "einsum, examples elsewhere": Case(
        lambda: Call(
            lambda m, x: torch.einsum("btd,dhk->htbk", x, m.w).mT.movedim(3, 0), w=(4, 2, 3)
        ),
        rows(),
    ),
    "einsum of three": Case(
        lambda: Call(
            lambda m, x: torch.einsum("...i,oij,...j->...o", x, m.w, x.square()), w=(3, 4, 4)
        ),
        rows(),
    ),
    "einsum that sums a letter away": Case(
        lambda: Call(lambda m, x: torch.einsum("bi,ij->b", x, m.w)[:, None], w=(4, 3))
    ),
    "einsum on rows": Case(
        lambda: Call(
            lambda m, x: torch.einsum("nd,de->ne", x.flatten(0, 1), m.w).unflatten(0, x.shape[:2]),
            w=(4, 3),
        ),
        rows(),
    ),
    "einsum on rows, time first": Case(
        lambda: Call(
            lambda m, x: (
                torch.einsum("nd,de->ne", transpose_output(x), m.w)
                .view(-1, len(x), 3)
                .movedim(1, 0)
            ),
            w=(4, 3),
        ),
        rows(),
    ),
    "bilinear": Case(
        lambda: Call(lambda m, x: F.bilinear(x, x.tanh(), m.w, m.b), w=(3, 4, 4), b=(3,)), rows()
    ),
    "conv transposed": Case(
        lambda: nn.ConvTranspose2d(2, 4, 3, stride=2, output_padding=1, groups=2), image(2, 2)
    ),
    "embedding": Case(lambda: nn.Embedding(6, 3), lambda t: (t,), 6),
    "embedding, padding_idx": Case(lambda: nn.Embedding(6, 3, padding_idx=-1), lambda t: (t,), 6),
    "embedding, max_norm": Case(lambda: nn.Embedding(6, 3, max_norm=0.5), lambda t: (2, t), 6),
    "embedding of one index": Case(lambda: nn.Embedding(6, 3), lambda t: (), 6),
    "a parameter indexed": Case(lambda: Call(lambda m, i: m.p[i], p=(6, 3)), lambda t: (t,), 6),
    "index_select": Case(
        lambda: Call(lambda m, i: m.p.index_select(0, i), p=(6, 3)), lambda t: (), 6
    ),
    **{
        f"embedding bag, {mode}": Case(
            lambda mode=mode: nn.EmbeddingBag(6, 3, mode=mode, padding_idx=2, max_norm=1.0),
            lambda t: (t,),
            6,
        )
        for mode in ("sum", "mean", "max")
    },
    "embedding bag, one bag after another": Case(lambda: Call(bags, p=(6, 3)), lambda t: (t,), 6),
    "layer norm": Case(lambda: nn.LayerNorm(4), rows()),
    "layer norm over two": Case(lambda: nn.LayerNorm((3, 4)), lambda t: (t, 3, 4)),
    "layer norm, no bias": Case(lambda: nn.LayerNorm(4, bias=False), rows()),
    "group norm": Case(lambda: nn.GroupNorm(2, 4), image(4, 2)),
    "instance norm": Case(lambda: nn.InstanceNorm1d(3, affine=True), lambda t: (3, t + 1)),
    "rms norm": Case(lambda: nn.RMSNorm(4), rows()),
    "rms norm by hand": Case(
        lambda: Call(
            lambda m, x: m.w * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3)), w=(4,)
        ),
        rows(),
    ),
    "batch norm in evaluation": Case(lambda: nn.BatchNorm2d(4).eval(), image(4, 2)),
    "batch norm of vectors in evaluation": Case(lambda: nn.BatchNorm1d(4).eval()),
    "prelu": Case(lambda: nn.PReLU(), rows()),
    "prelu by channel": Case(lambda: nn.PReLU(3), image(3, 1)),
    "scale and shift": Case(
        lambda: Call(lambda m, x: x * m.s / m.t + m.b - 2 * m.c, s=(4,), t=(1,), b=(2, 1, 1), c=()),
        rows(2),
    ),
    "power, maximum, where": Case(
        lambda: Call(
            lambda m, x: torch.where(x > 0, torch.maximum(x, m.a), x.abs() ** (m.b.exp() + 1)),
            a=(4,),
            b=(1, 4),
        ),
        rows(),
    ),
    "in place": Case(lambda: Call(in_place, p=(4,), w=(1, 4)), rows()),
    "set": Case(lambda: Call(set_first, p=(4,)), rows()),
    "set where masked": Case(lambda: Call(set_masked, p=(4,)), rows()),
    "masked_fill": Case(lambda: Call(lambda m, x: x.masked_fill(x > 0, m.p), p=()), rows()),
    "mean squared distance": Case(
        lambda: Call(lambda m, x: F.mse_loss(x, m.p.expand_as(x), reduction="none"), p=(4,)), rows()
    ),
    "distances to centres": Case(lambda: Call(lambda m, x: torch.cdist(x, m.p), p=(3, 4)), rows()),
    "cosines with centres": Case(
        lambda: Call(lambda m, x: F.cosine_similarity(x[:, None], m.p, dim=-1), p=(3, 4))
    ),
    "divergence from a prior, which torch maps in a loop": Case(
        lambda: Call(
            lambda m, x: F.kl_div(x.log_softmax(-1), m.p.softmax(0), reduction="none"), p=(4,)
        ),
        rows(),
    ),
    "scales on rows, time first": Case(
        lambda: Call(
            lambda m, x: (
                (transpose_output(x) * m.w + m.b.expand(x[..., 0].numel(), 4))
                .view(-1, len(x), 4)
                .movedim(1, 0)
            ),
            w=(4,),
            b=(1, 4),
        ),
        rows(),
    ),
    "norms on rows": Case(
        lambda: Call(
            lambda m, x: (
                F.layer_norm(x.flatten(0, 1), (4,), m.w, m.b).mul(m.s).unflatten(0, x.shape[:2])
            ),
            w=(4,),
            b=(4,),
            s=(4,),
        ),
        rows(),
    ),
}


def inputs(case: Case, size: int, length: int, dtype: torch.dtype) -> tuple[Tensor]:
    shape = (size, *case.shape(length))
    if case.num_ids is not None:
        return (torch.randint(case.num_ids, shape),)
    return (torch.randn(shape, dtype=dtype),)


@pytest.mark.fast(16)
@pytest.mark.parametrize("name", LAYERS)
@seeded_examples(3)
@given(
    size=st.integers(1, 7),
    length=st.integers(1, 7),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 99),
)
@example(size=6, length=6, dtype=torch.float64, seed=0)  # a sequence as long as the batch
@example(size=1, length=3, dtype=torch.float64, seed=1)
def test_a_layer_has_the_figures_of_each_example_alone(name, size, length, dtype, seed):
    torch.manual_seed(seed)
    case = LAYERS[name]
    model = case.build().to(dtype)
    assert_as_one_at_a_time(model, inputs(case, size, length, dtype))


@seeded_examples(25)
@given(data=st.data())
def test_convolutions_of_every_kind(data):
    dims = data.draw(st.sampled_from([1, 2, 3]), "dims")
    groups = data.draw(st.sampled_from([1, 2]), "groups")
    kernel = data.draw(st.integers(1, 3), "kernel")
    dilation = data.draw(st.integers(1, 2), "dilation")
    mode = data.draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]), "mode")
    if mode == "reflect" and dims == 3 and kernel == 1:
        mode = "zeros"
    padding = data.draw(st.sampled_from(["same", "valid", 0, 1]), "padding")
    stride = 1 if padding == "same" else data.draw(st.integers(1, 2), "stride")
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
        2,
        4,
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=data.draw(st.booleans(), "bias"),
        padding_mode=mode,
    )
    size = data.draw(st.integers(1, 6), "size")
    assert_as_one_at_a_time(layer.double(), (torch.randn(size, 2, *[6] * dims).double(),))


@seeded_examples(12)
@given(data=st.data())
def test_transposed_convolutions_of_every_kind(data):
    dims = data.draw(st.sampled_from([1, 2, 3]), "dims")
    stride = data.draw(st.integers(1, 2), "stride")
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1](
        4,
        2,
        data.draw(st.integers(1, 3), "kernel"),
        stride=stride,
        padding=data.draw(st.integers(0, 1), "padding"),
        output_padding=data.draw(st.integers(0, stride - 1), "output_padding"),
        groups=data.draw(st.sampled_from([1, 2]), "groups"),
        dilation=data.draw(st.integers(1, 2), "dilation"),
    )
    size = data.draw(st.integers(1, 6), "size")
    assert_as_one_at_a_time(layer.double(), (torch.randn(size, 4, *[4] * dims).double(),))


def test_figures_of_other_examples_are_not_taken_for_these():  # the control
    torch.manual_seed(0)
    model, batch = nn.Linear(4, 3).double(), (torch.randn(6, 4).double(),)
    truth = one_at_a_time(model, batch)
    figures = observe_figures(model, (batch[0].roll(1, 0),))
    assert worst(figures, truth) > 1e3 * BOUND[torch.float32]
    swapped = truth._replace(squares={n: s.flip(0) for n, s in truth.squares.items()})
    assert worst(swapped, truth) > 1e3 * BOUND[torch.float32]
