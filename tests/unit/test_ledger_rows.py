"""Rows of examples that change places at a later step: seen at that step, and at no other.

Oracle: |grad v_i| by `torch.autograd.grad` of each value of the batch, in float64. Tolerance 1e-9,
since sums are taken in another order; norms of the examples in another order are off by 0.1 or
more, which the control shows.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import anybatch as ab
from anybatch.errors import LedgerError
from anybatch.ledger import calibration, watched_pass
from anybatch.ledger.contractions.placement import Plan
from anybatch.ledger.row_moves import RowMoves

SIZE, BOUND = 8, 1e-9
IN_ORDER = torch.arange(SIZE)
MIXED = torch.tensor([3, 1, 2, 7, 5, 4, 0, 6])
Move = Callable[[Tensor, Tensor], Tensor]  # (rows, order) -> rows in that order, or another


def permutation(order: Tensor, x: Tensor) -> Tensor:
    return F.one_hot(order, len(order)).to(x)


def places(x: Tensor, order: Tensor) -> Tensor:
    """Compute where the elements of the ordered rows are in the flat tensor."""
    return order[:, None] * x.shape[1] + torch.arange(x.shape[1])


def fill(x: Tensor, order: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for k, i in enumerate(order.tolist()):
        y[k] = x[i]
    return y


def place(x: Tensor, order: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[order.argsort()] = x
    return y


def through_numpy(x: Tensor, order: Tensor) -> Tensor:
    return x[order] if x.requires_grad else torch.from_numpy(x.numpy()[order.numpy()])


def through_lists(x: Tensor, order: Tensor) -> Tensor:
    if x.requires_grad:
        return x[order]
    rows = x.tolist()
    return torch.tensor([rows[i] for i in order.tolist()], dtype=x.dtype)


def unless_in_order(move: Callable[[Tensor], Tensor]) -> Move:
    """A fixed move, made once the batch is out of order."""
    return lambda x, order: x if bool((order.diff() > 0).all()) else move(x)


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x[order]

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        return d[ctx.saved_tensors[0].argsort()], None


def back(x: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(x), order.argsort()


MOVES: dict[str, Move] = {
    "x[order]": lambda x, o: x[o],
    "x[list]": lambda x, o: x[o.tolist()],
    "x[array]": lambda x, o: x[o.numpy()],
    "index_select": lambda x, o: torch.index_select(x, dim=0, index=o),
    "gather": lambda x, o: x.gather(0, o[:, None].expand_as(x)),
    "take_along_dim": lambda x, o: torch.take_along_dim(x, o[:, None], 0),
    "take": lambda x, o: torch.take(x, places(x, o)),
    "x.flatten()[places]": lambda x, o: x.flatten()[places(x, o)],
    "stack": lambda x, o: torch.stack([x[i] for i in o.tolist()]),
    "cat": lambda x, o: torch.cat([x[i : i + 1] for i in o.tolist()]),
    "vstack": lambda x, o: torch.vstack([x[i] for i in o]),
    "unbind": lambda x, o: torch.stack([x.unbind()[i] for i in o.tolist()]),
    "y[k] = x[i]": fill,
    "y[order] = x": place,
    "index_copy": lambda x, o: back(x, o)[0].index_copy(0, back(x, o)[1], x),
    "index_add_": lambda x, o: back(x, o)[0].index_add_(0, back(x, o)[1], x),
    "scatter": lambda x, o: back(x, o)[0].scatter(0, back(x, o)[1][:, None].expand_as(x), x),
    "index_put": lambda x, o: back(x, o)[0].index_put((back(x, o)[1],), x),
    "aten.index": lambda x, o: torch.ops.aten.index.Tensor(x, [o]),
    "embedding": lambda x, o: F.embedding(o, x),
    "a permutation matrix": lambda x, o: permutation(o, x) @ x,
    "einsum": lambda x, o: torch.einsum("ij,jk->ik", permutation(o, x), x),
    "linear": lambda x, o: F.linear(x.T, permutation(o, x)).T,
    "sparse": lambda x, o: torch.sparse.mm(permutation(o, x).to_sparse(), x),
    "vmap": lambda x, o: torch.vmap(lambda i: x[i])(o),
    "numpy": through_numpy,
    "lists": through_lists,
    "a function with a gradient of its own": Gather.apply,
    "flip": unless_in_order(lambda x: x.flip(0)),
    "roll": unless_in_order(lambda x: x.roll(1, 0)),
    "flipud": unless_in_order(lambda x: x.flipud()),
    "reversed": unless_in_order(lambda x: reversed(x)),
    "chunks": unless_in_order(lambda x: torch.cat(x.chunk(2)[::-1])),
    "halves": unless_in_order(lambda x: torch.cat([x[len(x) // 2 :], x[: len(x) // 2]])),
    "columns of the transpose": unless_in_order(lambda x: torch.hstack(x.T.hsplit(2)[::-1]).T),
}
ARITHMETIC: dict[str, Move] = {
    "sums of products": lambda x, o: (permutation(o, x)[:, :, None] * x[None]).sum(1),
    "a mean over the batch": unless_in_order(lambda x: x - x.mean(0)),
    "sums over the batch": unless_in_order(lambda x: x.cumsum(0)),
    "a transform over the batch": unless_in_order(
        lambda x: torch.fft.ifft(torch.fft.fft(x, dim=0).conj(), dim=0).real
    ),
    "a view": unless_in_order(lambda x: x.view(2, -1, x.shape[1]).transpose(0, 1).reshape(x.shape)),
}


class Moving(nn.Module):
    """Two layers; rows are moved before them, between them or after them."""

    def __init__(self, move: Move, where: str) -> None:
        super().__init__()
        self.move, self.where = move, where
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor, key: Tensor) -> Tensor:
        order = key.argsort()
        if self.where == "before":
            return self.b(self.a(self.move(x, order)).tanh())
        if self.where == "before, and back":
            return self.b(self.a(self.move(x, order)).tanh())[order.argsort()]
        if self.where == "between":
            return self.b(self.move(self.a(x).tanh(), order))
        return self.move(self.b(self.a(x).tanh()), order)


WHERE = ["before", "before, and back", "between", "after"]


def losses(model: nn.Module, batch: Any) -> Tensor:
    return model(*batch).square().sum(1)


OBJECTIVE = ab.Objective(losses, reduction=ab.Sum())


def distance(model: nn.Module, x: Tensor, key: Tensor) -> float:
    """Return the relative distance of the ledger's norms from autograd's."""
    norms = ab.batch_gradient(model, OBJECTIVE, (x, key), observe=ab.Observe()).ledger.norms
    expected = true_norms(model, x, key)
    return float((norms - expected).norm() / expected.norm())


def true_norms(model: nn.Module, x: Tensor, key: Tensor) -> Tensor:
    norms = []
    for v in losses(model, (x, key)):
        gradients = torch.autograd.grad(v, list(model.parameters()), retain_graph=True)
        norms.append(torch.cat([g.flatten() for g in gradients]).norm())
    return torch.stack(norms)


def setting(move: Move, where: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Moving(move, where).double(), torch.randn(SIZE, 4, dtype=torch.float64)


def right_or_refused(model: nn.Module, x: Tensor, key: Tensor) -> bool:
    try:
        return distance(model, x, key) < BOUND
    except LedgerError as error:
        return "reach rows of others" in str(error)


@pytest.mark.fast(29)
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", MOVES)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_rows_that_change_places_are_seen_at_that_step(name, where, monkeypatch):
    monkeypatch.setattr(watched_pass, "_FIRST_STEPS", 0)  # by the call alone
    model, x = setting(MOVES[name], where)
    assert distance(model, x, IN_ORDER) < BOUND
    assert right_or_refused(model, x, MIXED.argsort())


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", ARITHMETIC)
def test_rows_that_arithmetic_moves_are_seen_in_the_first_steps(name, where):
    model, x = setting(ARITHMETIC[name], where)
    for _ in range(3):
        assert distance(model, x, IN_ORDER) < BOUND
    assert right_or_refused(model, x, MIXED.argsort())


@pytest.mark.parametrize("name", [name for name in ARITHMETIC if name != "sums of products"])
def test_a_graph_of_another_form_is_confirmed_at_once(name):
    model, x = setting(ARITHMETIC[name], "between")
    for _ in range(20):
        assert distance(model, x, IN_ORDER) < BOUND
    assert right_or_refused(model, x, MIXED.argsort())


def test_without_a_form_they_are_seen_at_every_32nd_step_and_not_between(monkeypatch):
    monkeypatch.setattr(calibration, "find_form", lambda *_: None)
    model, x = setting(ARITHMETIC["a view"], "between")
    for _ in range(16):
        assert distance(model, x, IN_ORDER) < BOUND
    for _ in range(15):
        assert distance(model, x, MIXED.argsort()) > 0.1  # the control, and what docs own up to
    assert distance(model, x, MIXED.argsort()) < BOUND


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [8, 300])
def test_two_rows_that_change_places_are_seen_in_narrow_types_and_large_batches(
    dtype, size, monkeypatch
):
    monkeypatch.setattr(watched_pass, "_FIRST_STEPS", 0)
    model, x = setting(MOVES["x[order]"], "between")
    model, x = model.to(dtype), torch.randn(size, 4, dtype=dtype)
    key = torch.arange(size)
    ab.batch_gradient(model, OBJECTIVE, (x, key), observe=ab.Observe())
    ab.batch_gradient(model, OBJECTIVE, (x, 2 * key), observe=ab.Observe())
    key[[size - 1, size - 2]] = key[[size - 2, size - 1]]
    changes: list[object] = []
    reject = Plan.reject
    monkeypatch.setattr(
        Plan, "reject", lambda *arguments: (changes.append(arguments), reject(*arguments))
    )
    ab.batch_gradient(model, OBJECTIVE, (x, key), observe=ab.Observe())
    assert changes


def test_a_hook_that_is_not_linear_is_not_taken_for_rows_that_move():
    model, x = setting(lambda x, order: x, "between")

    def clamp(model: nn.Module, batch: Any) -> Tensor:
        outputs = model(*batch)
        outputs.register_hook(lambda g: g.clamp(-0.02, 0.02))
        return outputs.square().sum(1)

    objective = ab.Objective(clamp, reduction=ab.Sum())
    for _ in range(3):
        gradient = ab.batch_gradient(model, objective, (x, IN_ORDER), observe=ab.Observe())
    plain = ab.batch_gradient(model, objective, (x, IN_ORDER))
    assert gradient.ledger is not None
    assert float(gradient.loss) == pytest.approx(float(plain.loss))


class Recording(TorchFunctionMode):
    """Mode that records whether any call may move rows of so many examples."""

    def __init__(self, moves: RowMoves, size: int) -> None:
        super().__init__()
        self.moves, self.size, self.may_move = moves, size, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.may_move |= self.moves.may_move(func, args, kwargs, self.size)
        return func(*args, **(kwargs or {}))


X, IDS = torch.randn(8, 6, 5), torch.arange(8)
TABLE = torch.randn(16, 5)
HARMLESS: dict[str, Callable[[], object]] = {
    "the last time step": lambda: X[:, -1],
    "the last token of each": lambda: X[IDS, IDS % 6],
    "a gather along time": lambda: X.gather(1, (IDS % 6)[:, None, None].expand(8, 1, 5)),
    "chosen logits": lambda: torch.randn(8, 6, 16).gather(2, torch.zeros(8, 6, 1).long()),
    "a look-up in frozen weights": lambda: F.embedding(IDS, nn.Parameter(TABLE, False)),
    "a look-up in a buffer": lambda: TABLE[IDS],
    "a look-up in a view of it": lambda: TABLE[:16].index_select(0, IDS),
    "sorted vocabulary": lambda: X.sort(-1),
    "the best tokens": lambda: X.topk(2),
    "heads put together": lambda: torch.cat([X, X], -1),
    "time steps put together": lambda: torch.stack(list(X.unbind(1)), 1),
    "a class token": lambda: torch.cat([X[:, :1], X], 1),
    "masked in place": lambda: X.clone().__setitem__(X > 0, 0.0),
    "one column written": lambda: X.clone().__setitem__((slice(None), 0), X[:, 1]),
    "attention": lambda: (X @ X.mT) @ X,
    "time reversed": lambda: X.flip(1),
    "each in its place": lambda: X[IDS],
    "each in its place, by a range": lambda: X[range(8), IDS % 6],
}


@pytest.mark.parametrize("name", HARMLESS)
def test_ordinary_calls_cost_nothing(name):
    with Recording(RowMoves([TABLE]), 8) as recording:
        HARMLESS[name]()
    assert not recording.may_move


def test_a_size_that_some_batch_does_not_share_is_no_batch():
    """A head of 8 channels, in a batch of 8."""
    moves = RowMoves()
    for size in (5, 8):
        x = torch.randn(size, 2, 8)
        with Recording(moves, size) as recording:
            torch.cat([x[..., 4:], x[..., :4]], -1)
        assert not recording.may_move
    with Recording(RowMoves(), 8) as recording:  # the control
        torch.cat([x[..., 4:], x[..., :4]], -1)
    assert recording.may_move


MOVING: dict[str, Callable[[Tensor], object]] = {
    "two of them, by a mask in a list": lambda x: x[[False, True]],
    "all of them, by a mask": lambda x: x[torch.tensor([False, True])],
}


@pytest.mark.parametrize("name", MOVING)
def test_a_mask_is_not_taken_for_places(name):
    with Recording(RowMoves(), 2) as recording:
        MOVING[name](torch.randn(2, 3))
    assert recording.may_move


def test_mixed_inputs_are_right_and_mixed_features_are_refused():
    """Mixup with another example of the batch: data in the first case, coupled in the second."""

    def mix_rows(x: Tensor) -> Tensor:
        return 0.7 * x + 0.3 * x[torch.randperm(len(x))]

    def inputs(model: nn.Module, batch: Any) -> Tensor:
        return model.b(model.a(mix_rows(batch[0])).tanh()).square().sum(1)

    def features(model: nn.Module, batch: Any) -> Tensor:
        return model.b(mix_rows(model.a(batch[0])).tanh()).square().sum(1)

    model, x = setting(lambda x, order: x, "between")
    key = ab.Key(0, 0)
    gradient = ab.batch_gradient(
        model, ab.Objective(inputs, ab.Sum()), (x,), observe=ab.Observe(), key=key
    )
    torch.manual_seed(key.grain(0))
    norms = []
    for v in inputs(model, (x,)):
        gradients = torch.autograd.grad(v, list(model.parameters()), retain_graph=True)
        norms.append(torch.cat([g.flatten() for g in gradients]).norm())
    expected = torch.stack(norms)
    assert float((gradient.ledger.norms - expected).norm() / expected.norm()) < BOUND
    with pytest.raises(LedgerError, match="reach rows of others"):
        ab.batch_gradient(model, ab.Objective(features), (x,), observe=ab.Observe(), key=key)


def bn_model(num_frozen: int) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6)
    )
    for layer in list(model)[:num_frozen]:
        layer.requires_grad_(False)
    return model.double()


@pytest.mark.parametrize("grain", [8, 4])
def test_frozen_layers_below_a_batch_normalisation_are_right(grain):
    """Freeze the first layers: the statistics of the second are constants too."""
    x = torch.randn(8, 4, dtype=torch.float64)
    objective = ab.Objective(
        lambda model, batch: model(*batch).square().sum(1), reduction=ab.Sum(), grain=grain
    )
    model = nn.Sequential(*bn_model(1)[:3], nn.Linear(6, 3).double())
    norms = ab.batch_gradient(model, objective, (x,), observe=ab.Observe()).ledger.norms
    rows = []
    for part in x.split(grain):
        for v in model(part).square().sum(1):
            trained = [p for p in model.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(v, trained, retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in gradients]).norm())
    expected = torch.stack(rows)
    assert float((norms - expected).norm() / expected.norm()) < BOUND


@pytest.mark.parametrize("num_frozen", [0, 2, 3])
def test_a_batch_normalisation_above_trained_layers_is_refused(num_frozen):
    x = torch.randn(8, 4, dtype=torch.float64)
    with pytest.raises(LedgerError, match=r"couples examples, and parameters below it are trained"):
        ab.batch_gradient(
            bn_model(num_frozen),
            ab.Objective(lambda model, batch: model(*batch).square().sum(1)),
            (x,),
            observe=ab.Observe(),
        )
