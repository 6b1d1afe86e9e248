"""Random projections of each example's gradient.

Oracles: a matrix S [k, p q], filled in by a loop over the definition, times the gradients of
`one_at_a_time`, which are plain autograd in float64. Tolerance: 1e-10 of the norm, as in
`ledger_cases`. Where draws are averaged, bounds follow from the number of draws.
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anybatch as ab
from anybatch.errors import LedgerError
from anybatch.ledger.contractions.projection import draw_projection
from ledger_cases import Values, one_at_a_time, trainable, values

SIZE = 12
EXACT = 1e-10
CPU = torch.device("cpu")
PINNED = (512, [453, 465, 64], [-1, 1, 1], [390, 76, 84, 49], [1, 1, 1, -1])


class Tied(nn.Module):
    """Embedding with padding, shared with the last layer, and a norm between them."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6, padding_idx=0)
        self.norm = nn.LayerNorm(6)
        self.middle = nn.Linear(6, width)
        self.back = nn.Linear(width, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.middle(self.norm(self.embedding(x))))
        output: Tensor = self.head(self.back(hidden)).mean(1)
        return output


class Scaled(nn.Module):
    """A scalar, a matrix used twice, and a complex filter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.matrix = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
        self.filter = nn.Parameter(torch.randn(3, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x @ self.matrix) @ self.matrix * self.scale
        return torch.fft.irfft(torch.fft.rfft(x) * self.filter, 4)


class Recurrent(nn.LSTM):
    """An LSTM that returns its outputs alone."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        output: Tensor = super().forward(x)[0]
        return output


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tokens(*shape: int) -> Tensor:
    return torch.randint(9, shape, generator=torch.Generator().manual_seed(2))


CASES: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
    "two layers": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)),
        (normal(7, 5),),
    ),
    "wide layers, by Fourier transforms": (
        lambda: nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 24)),
        (normal(7, 40),),
    ),
    "rows of a wide layer": (lambda: nn.Linear(60, 50), (normal(5, 3, 60),)),
    "convolutions and a group norm": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 2, 2)
        ),
        (normal(5, 2, 6, 6),),
    ),
    "tied embeddings": (Tied, (tokens(6, 5),)),
    "tied embeddings and wide layers": (lambda: Tied(300), (tokens(6, 5),)),
    "a scalar, a shared matrix, complex numbers": (Scaled, (normal(5, 4),)),
    "an LSTM": (lambda: Recurrent(3, 4, batch_first=True), (normal(5, 6, 3),)),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)),
        (normal(6, 5),),
    ),
}


def make(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    build, batch = CASES[name]
    return build().double(), batch


def observe(model: nn.Module, batch: Any, tell: Values = values, **how: Any) -> Tensor:
    """Return the projections that the library computes."""
    objective = ab.Objective(tell, penalty=ab.L2(0.1))
    options = {"observe": ab.Observe(norms=False, projections=SIZE)} | how
    ledger = ab.batch_gradient(model, objective, batch, **options).ledger
    assert ledger is not None
    assert ledger.projections is not None
    assert ledger.norms is None
    return ledger.projections


def fill_matrix(name: str, shape: tuple[int, ...]) -> Tensor:
    """Fill S [k, p q] from its definition, one element after the other."""
    _, h, r, e, c = draw_projection(name, shape, SIZE, CPU)
    matrix = torch.zeros(SIZE, len(h) * len(e), dtype=torch.float64)
    for i in range(len(h)):
        for j in range(len(e)):
            place = (int(h[i]) + int(e[j])) % SIZE
            matrix[place, i * len(e) + j] = int(r[i]) * int(c[j])
    return matrix


def project(gradients: dict[str, Tensor]) -> Tensor:
    """Project the gradients [B, ...] of all parameters; a complex number is two real ones."""
    parts = [
        g.reshape(len(g), -1) @ fill_matrix(name, tuple(g.shape[1:])).T
        for name, g in gradients.items()
    ]
    return torch.stack(parts).sum(0)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", CASES)
def test_the_projection_is_that_of_each_gradient_alone_in_every_layout(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, batch = make(name)
    truth = project(one_at_a_time(model, batch).gradients)
    size = len(batch[0])
    for sizes in (None, 1, (2, size - 2)):
        result = observe(model, batch, layout=ab.Layout(micro_batch=sizes))
        assert distance(result, truth) < EXACT, sizes
    assert caplog.messages == []  # none of them went through its examples one after the other
    assert distance(result.flip(0), truth) > 0.1  # the control: of other examples
    assert distance(result.roll(1, 1), truth) > 0.1  # and in other places


def test_it_is_that_of_the_own_mean_loss_whatever_the_reduction_counts_and_clipping() -> None:
    model, batch = make("two layers")
    counts = torch.tensor([1.0, 2, 0, 5, 1, 3, 4], dtype=torch.float64)

    def tell(model: nn.Module, batch: Any) -> ab.ExampleLosses:
        return ab.ExampleLosses(values(model, batch[:1]), counts=batch[1])

    plain = project(one_at_a_time(model, batch).gradients)
    truth = torch.where(counts[:, None] > 0, plain / counts[:, None].clamp(min=1), 0)
    for reduction in (ab.Mean(), 0.01 * ab.Sum(), ab.TopFraction(0.3), ab.Tilted(0.5)):
        for clip in (None, ab.ClipExamples(0.1)):
            objective = ab.Objective(tell, reduction)
            gradient = ab.batch_gradient(
                model,
                objective,
                (*batch, counts),
                observe=ab.Observe(projections=SIZE),
                clip=clip,
                layout=ab.Layout(micro_batch=4),
            )
            assert distance(gradient.ledger.projections, truth) < EXACT
    assert distance(plain, truth) > 0.1  # the control: of the summed losses


def test_losses_without_a_graph_and_empty_parts_have_zeros() -> None:
    model = nn.Linear(3, 1)
    result = observe(model, (torch.ones(4, 3), torch.zeros(4)), _tell_masked)
    assert torch.equal(result, torch.zeros(4, SIZE))
    assert observe(model, (torch.ones(4, 3), torch.ones(4)), _tell_masked).abs().sum() > 0


def _tell_masked(model: nn.Module, batch: Any) -> Tensor:
    losses: Tensor = model(batch[0])[:, 0] * batch[1]
    return losses


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_scripted_code_and_bfloat16_are_projected_too() -> None:
    torch.manual_seed(0)
    scripted = torch.jit.script(nn.Sequential(nn.Linear(5, 4), nn.Tanh()))
    batch = (normal(6, 5).float(),)
    truth = project({n: g.double() for n, g in one_at_a_time(scripted, batch).gradients.items()})
    assert distance(observe(scripted, batch).double(), truth) < 1e-5  # float32
    model = nn.Sequential(nn.Linear(30, 24), nn.Tanh(), nn.Linear(24, 20))
    batch = (normal(6, 30).float(),)
    exact = observe(model, batch)
    narrow = observe(model, batch, precision="bfloat16")
    assert narrow.dtype == torch.float32
    assert distance(narrow, exact) < 0.05  # 8 bits


@pytest.mark.parametrize("is_outer", [True, False])
def test_inner_products_are_those_of_the_gradients_on_average(is_outer: bool) -> None:
    """The mean over n draws lies within 5 standard errors, and the error of one is about
    |x| |y| / sqrt(k)."""
    x, y = normal(2, 8, 8)
    if is_outer:
        x, y = torch.outer(x[0], x[1]), torch.outer(x[0] + y[0], y[1] + x[1])
    size, products, number = 64, [], 2000
    for draw in range(number):
        projection = draw_projection(f"draw {draw}", (8, 8), size, CPU)
        s, t = projection.project_gradients([torch.stack([x, y])])
        products.append(float(s @ t))
    errors = (torch.tensor(products) - float((x * y).sum())) / float(x.norm() * y.norm())
    spread = float(errors.std())
    assert abs(float(errors.mean())) < 5 * spread / math.sqrt(number)
    assert 0.5 < spread * math.sqrt(size) < 2
    shifted = errors + spread  # the control: a biased product would be seen
    assert abs(float(shifted.mean())) > 5 * spread / math.sqrt(number)


def test_the_draw_is_fixed_for_ever_and_differs_by_name_shape_and_size() -> None:
    """Ledgers that were written by other versions of torch or anybatch can be compared."""
    size, h, r, e, c = draw_projection("body.weight", (3, 4), 512, CPU)
    assert (size, h.tolist(), r.tolist(), e.tolist(), c.tolist()) == PINNED
    others = [
        ("body.bias", (3, 4), 512),
        ("body.weight", (4, 3), 512),
        ("body.weight", (3, 4), 511),
    ]
    for other in others:
        assert draw_projection(*other, CPU)[1].tolist() != PINNED[1]


def test_a_projection_changes_no_gradient_and_is_refused_with_a_wrong_size() -> None:
    model, batch = make("convolutions and a group norm")
    objective = ab.Objective(lambda model, batch: values(model, batch))
    ab.batch_gradient(model, objective, batch)
    plain = {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}
    ab.batch_gradient(model, objective, batch, observe=ab.Observe(projections=SIZE))
    for name, p in trainable(model).items():
        assert p.grad is not None
        assert distance(p.grad, plain[name]) < 1e-12
    for wrong in (-1, 2.5, True, "512"):
        with pytest.raises(LedgerError, match=r"projections to be a number of at least 0, such as"):
            ab.Observe(projections=wrong)  # type: ignore[arg-type]


def test_a_duplicate_and_an_opposite_label_are_found_by_the_cosine() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 2)).double()
    inputs, targets = normal(40, 20), torch.arange(40) % 2
    inputs[30], targets[30] = inputs[3], targets[3]
    inputs[31], targets[31] = inputs[3], 1 - targets[3]
    result = observe(
        model,
        (inputs, targets),
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"),
        observe=ab.Observe(norms=False, projections=512),
    )
    rows = result / result.norm(dim=1, keepdim=True)
    cosines = rows @ rows[3]
    cosines[3] = 0
    assert (int(cosines.argmax()), int(cosines.argmin())) == (30, 31)
    assert cosines[30] == pytest.approx(1, abs=1e-10)
    assert cosines[31] == pytest.approx(-1, abs=1e-10)
