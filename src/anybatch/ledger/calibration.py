"""Where examples lie at each meeting of a model, found once and checked against plain autograd.

    probe      v_i of one example alone goes back: gradients of the others must be 0 (`placement`)
    compare    |grad v_i|^2 and sum_i c_i grad v_i, by parameter, with plain autograd

on a few examples, at the 1st, 10th, 100th, ... step that a model is observed in its present mode:
two forward passes where all is well. Parameters are perturbed meanwhile, so that branches
initialised to 0 produce gradients too. Whatever the passes leave behind is put back (`traces`).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from anybatch.errors import LedgerError
from anybatch.ledger.confirmation import gradients_kept
from anybatch.ledger.contractions.placement import Plan
from anybatch.ledger.coupling import refuse_coupled, same
from anybatch.ledger.gradient_taps import SecondDerivative
from anybatch.ledger.row_moves import Moves
from anybatch.ledger.trial_run import Look, remember
from anybatch.ledger.unplaced import AsUnplaced, UnplacedError
from anybatch.ledger.watched_pass import Pass, go_back_and_keep

__all__ = ["CHECKED", "NUM_PROBED", "Part", "plan_of", "replan"]

NUM_PROBED = 5
_SHRUNK = 64  # a clamp or a threshold shows between weights of 1 and of a batch's size
"""Examples that pass through: no size that layers often have, so that few shapes are ambiguous."""

CHECKED = frozenset(10**k for k in range(12))
"""Steps at which a plan is made anew: the rows of some examples may be mixed by chance in the order
that they were in."""
_SHAKE = 0.01
_MOST_ROUNDS = 50  # of looking for places; tensors have few, and each round rejects some
_CAUSES = (
    "Are rows of different examples mixed there (packed, routed, sorted), or does the model couple "
    "examples? Keep examples along a dimension of their own, freeze the parameter, or leave the "
    "model unobserved."
)
_UNCONFIRMED = (
    f"Examples cannot be told apart where they meet it, or it is used in two layouts. {_CAUSES}"
)
Pairs = Callable[[AbstractContextManager[object], Callable[[], None]], tuple[Tensor, Tensor]]
"""Values of some examples made in two ways, each forward pass within a context and after a call."""
Values = Callable[[AbstractContextManager[object]], Tensor]
"""The values v [B] of the probed examples, the forward pass made within a context."""
Part = Callable[[int, int], Tensor]
"""The values of the probed examples start .. stop-1 alone."""

_known: WeakKeyDictionary[nn.Module, dict[Any, Plan]] = WeakKeyDictionary()


def plan_of(
    model: nn.Module,
    mode: tuple[int, ...],
    parameters: Mapping[str, nn.Parameter],
    values: Values,
    part: Part | None = None,
    roots: Iterable[object] = (),
    coupling: str | None = None,
    repeats: Pairs | None = None,
) -> Plan:
    """The model's plan in its present mode. The model is left as it was.

    Args:
        model, mode: what it belongs to.
        parameters: the trainable ones, by name.
        values: makes a forward pass; each call draws the same random numbers.
        part: makes a forward pass of a part of the probed examples; None: there is none.
        roots: the functions, and other objects, that a forward pass may change.
        coupling: a layer that couples examples unless all below it is frozen, in a sentence.
        repeats: values of some examples among others, and among their like. Examples that these
            show to be apart go back one after the other where there is no plan; None: they do not.

    Raises:
        LedgerError: examples that are coupled, or gradients that plain autograd does not confirm.
    """
    plans, key = _known.setdefault(model, {}), (mode, repeats is None, *parameters)
    known = plans.get(key, Plan())
    known.num_steps += 1
    if known.num_steps not in CHECKED or known.one_by_one is not None:
        return known
    plan = Plan(by_copies=known.by_copies, moves=Moves(model.buffers()))
    with _trial(model, parameters, roots) as restore:

        def repeated(context: AbstractContextManager[object]) -> Tensor:
            restore(parameters=False)
            return values(context)

        look = Look(next(iter(parameters.values())).device)
        truth = _finite_truth(parameters, repeated, look, restore)
        if len(truth.values) < 2:  # all that there is belongs to that example
            return Plan()
        try:
            with AsUnplaced():
                _check(parameters, repeated, truth, plan, look.eps)
        except LedgerError as error:
            if plan.rejected and coupling is not None:
                raise _coupled(coupling) from error
            if plan.rejected and part is not None and not look.draws:
                halves = partial(_halves, part, restore, len(truth.values))
                refuse_coupled(model, halves, look.eps)
            plan = _go_one_by_one(known, error, look, repeats, restore)
    plan.is_linear = truth.is_linear(look.eps)
    plan.num_steps = known.num_steps
    plans[key] = plan
    return plan


def replan(
    plan: Plan,
    error: UnplacedError,
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    roots: Iterable[object],
    repeats: Pairs,
) -> None:
    """Change a plan that a step did not confirm, so that the step can be repeated.

    Raises:
        UnplacedError: examples that are coupled.
    """
    if not error.is_replaced:
        look = Look(next(iter(parameters.values())).device)
        with _trial(model, parameters, roots) as restore:
            _go_one_by_one(plan, error, look, repeats, restore)


def _go_one_by_one(
    plan: Plan,
    error: LedgerError,
    look: Look,
    repeats: Pairs | None,
    restore: Callable[..., None],
) -> Plan:
    """Let examples go back one after the other, if none changes with its neighbours."""
    if repeats is None or not isinstance(error, UnplacedError):
        raise error
    if not same(*repeats(look, partial(restore, parameters=False)), look.eps):
        raise UnplacedError(
            f"The loss of an example changes with its neighbours in the batch, so that losses of "
            f"some examples reach rows of others: the model couples examples. Use GroupNorm or "
            f"LayerNorm for BatchNorm, put a loss across the batch into the reduction, or leave "
            f"the model unobserved. The first sign of it: {error}"
        ) from error
    plan.go_one_by_one(str(error))
    return plan


def _coupled(coupling: str) -> LedgerError:
    return LedgerError(
        f"{coupling}, and parameters below it are trained, so that no gradient belongs to one "
        f"example alone. Put it in evaluation mode, use GroupNorm or LayerNorm in its place, "
        f"freeze all that is below it, or look at grains: ab.Observe(norms=False, "
        f"grain_norms=True)."
    )


def _halves(part: Part, restore: Callable[..., None], size: int) -> tuple[Tensor, Tensor]:
    """The values of some examples together, and of the same in two halves."""
    found = []
    for cut in [(0, size), (0, size // 2), (size // 2, size)]:
        restore(parameters=False)
        found.append(part(*cut).detach())
    return found[0], torch.cat(found[1:])


@contextmanager
def _trial(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], roots: Iterable[object]
) -> Iterator[Callable[..., None]]:
    """Perturb the parameters a little; yield what puts all else back, or the parameters too."""
    own, buffers = list(parameters.values()), list(model.buffers())
    before = {id(t): t.detach().clone() for t in (*own, *buffers)}
    gradients = [p.grad for p in own]
    hooks = [
        (home, dict(home))
        for p in own
        for home in (p._backward_hooks, p._post_accumulate_grad_hooks)
        if home
    ]
    restore_objects = remember([model, *roots], (*model.parameters(), *buffers))

    @torch.no_grad()
    def restore(*, parameters: bool) -> None:
        restore_objects()
        for tensor in (*buffers, *(own if parameters else ())):
            if not torch.equal(tensor, before[id(tensor)]):  # a graph may hold it
                tensor.copy_(before[id(tensor)])

    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for p in own:
                dtype = p.dtype if p.dtype.itemsize >= 4 else torch.float32
                noise = torch.randn(p.shape, generator=generator, dtype=dtype)
                p.add_(_SHAKE * noise.to(p))
                p.grad = None
        for home, _ in hooks:  # of parameters, which are to see whole updates alone
            home.clear()
        yield restore
    finally:
        for home, before_it in hooks:
            home.update(before_it)
        restore(parameters=True)
        for p, gradient in zip(own, gradients, strict=True):
            p.grad = gradient
        for home, kept_hooks in hooks:
            home.update(kept_hooks)


class _Truth(NamedTuple):
    """A few examples by plain autograd."""

    values: Tensor  # v [B]
    squares: list[dict[str, float]]  # |g_i|^2 by example and parameter
    weights: Tensor  # c [B]
    total: dict[str, Tensor]  # sum_i c_i g_i by parameter
    together: dict[str, Tensor]  # the same, all examples going back at once, each with its c_i

    @classmethod
    def of(cls, parameters: Mapping[str, nn.Parameter], v: Tensor, look: Look) -> Self:
        """Go back from the values of a forward pass, before another one writes over buffers.

        One example goes back at a time, with a weight of 1: a hook need not be linear.

        Args:
            look: under which the forward pass was made: checkpointing runs it again, and compares
                what it saves.
        """
        weights = torch.arange(1, len(v) + 1, dtype=v.dtype, device=v.device)
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        squares = []
        for i, weight in enumerate(weights.tolist()):
            chosen = torch.zeros_like(v)
            chosen[i] = 1
            _take(parameters)
            with look, gradients_kept([v], but=parameters.values()):
                go_back_and_keep([v], [chosen])
            own = _take(parameters)
            squares.append({name: _norm(g) ** 2 for name, g in own.items()})
            for name, g in own.items():
                total[name].add_(g, alpha=weight)
        with look, gradients_kept([v], but=parameters.values()):
            go_back_and_keep([v], [weights / _SHRUNK])
        together = {name: torch.zeros_like(p) for name, p in parameters.items()} | _take(parameters)
        together = {name: _SHRUNK * g for name, g in together.items()}
        return cls(v.detach(), squares, weights, total, together)

    def is_linear(self, eps: float) -> bool:
        """Whether gradients are in proportion to the weights that examples go back with."""
        norms = {
            name: sum(
                weight * own.get(name, 0.0) ** 0.5
                for weight, own in zip(self.weights.tolist(), self.squares, strict=True)
            )
            for name in self.total
        }
        try:
            _compare_totals(self.together, self.total, norms, eps)
        except UnplacedError:
            return False
        return True


def _finite_truth(
    parameters: Mapping[str, nn.Parameter],
    values: Values,
    look: Look,
    restore: Callable[..., None],
) -> _Truth:
    """What plain autograd says, of parameters as they were where the perturbed ones go too far."""
    v = values(look)
    look.eps = max(look.eps, torch.finfo(v.dtype).eps)  # a GRU's operation gives no tensor
    if not v.isfinite().all():
        restore(parameters=True)
        v = values(look)
    return _Truth.of(parameters, v, look)


def _check(
    parameters: Mapping[str, nn.Parameter], values: Values, truth: _Truth, plan: Plan, eps: float
) -> None:
    """Fill the plan, and compare values and gradients with those of plain autograd."""
    watched, v = _place(parameters, values, plan, len(truth.values))
    if not same(v.detach(), truth.values, eps):
        raise UnplacedError(
            f"the losses of a few examples are {truth.values.tolist()}, but {v.tolist()} when "
            f"their parameters are watched, expected the same: an operation cannot be taken apart "
            f"by example. Leave the model unobserved."
        )
    found, squares = _by_ledger(parameters, watched, v, truth.weights)
    for i, expected in enumerate(truth.squares):
        _compare_squares({name: float(rows[i]) for name, rows in squares.items()}, expected, eps)
    norms = {
        name: float(truth.weights @ rows.clamp(min=0).sqrt().to(truth.weights))
        for name, rows in squares.items()
    }
    _compare_totals(found, truth.total, norms, eps)


def _place(
    parameters: Mapping[str, nn.Parameter], values: Values, plan: Plan, size: int
) -> tuple[Pass, Tensor]:
    """Put into the plan the placements for which no loss of one example reaches another; return
    the forward pass for which this holds, and its values."""
    for _ in range(_MOST_ROUNDS):
        watched = Pass(parameters, size, plan)
        try:
            v = values(watched.mode)
        except SecondDerivative:  # which the plan now provides for
            continue
        with gradients_kept([v]):
            wrong = watched.misplaced([v], [torch.ones_like(v)])
        if not wrong:
            plan.unsure.clear()
            return watched, v
        for meeting, placement in wrong:
            plan.reject(meeting, placement)
    raise UnplacedError(f"no place of the examples in the operations of this model fits. {_CAUSES}")


def _compare_squares(found: Mapping[str, float], expected: Mapping[str, float], eps: float) -> None:
    """Compare |g_i|^2 of one example, by parameter."""
    for name, square in expected.items():
        own = found.get(name, 0.0)
        slack = min(0.2, 20 * eps**0.5) * max(square, own)
        if abs(own - square) > slack + eps**1.5 * sum(expected.values()):
            raise UnplacedError(
                f"the ledger finds {own:.6g} for the squared gradient of {name} of one example, "
                f"plain autograd {square:.6g}, expected the same. {_UNCONFIRMED}"
            )


def _compare_totals(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    norms: Mapping[str, float],
    eps: float,
) -> None:
    """Compare sum_i c_i g_i; norms are the sums of c_i |g_i|.

    Rounding is that of the terms of a sum, and a little of all parameters together, since one's own
    gradient may be 0 but for what is left of large numbers that cancel.
    """
    every = math.hypot(*norms.values())
    for name, right in expected.items():
        distance = _norm(found[name] - right)
        if distance > eps**0.5 * norms.get(name, 0.0) + eps**0.75 * every:
            raise UnplacedError(
                f"The ledger finds another gradient of {name} for a few examples than plain "
                f"autograd. The norm of their difference is {distance:.3g}, that of autograd's is "
                f"{_norm(right):.3g}. {_UNCONFIRMED}"
            )


def _by_ledger(
    parameters: Mapping[str, nn.Parameter], watched: Pass, v: Tensor, weights: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """sum_i c_i g_i, as it goes into `.grad`, and |g_i|^2 [B], by parameter."""
    plan = watched.plan
    _take(parameters)
    try:
        with gradients_kept([v], but=parameters.values()):
            squares = watched.go_back([v], [torch.ones_like(v)], weights=weights).squares
    except UnplacedError as error:
        lost = [str(m) for m, place in plan.chosen.items() if place is None and m in plan.rejected]
        if not lost:
            raise
        raise UnplacedError(
            f"the loss of one example reaches rows of others at the {' and the '.join(lost)}. "
            f"{_CAUSES}"
        ) from error
    return _take(parameters), squares


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))


def _take(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """What is in `.grad`, which is then empty."""
    taken = {}
    for name, p in parameters.items():
        taken[name] = torch.zeros_like(p) if p.grad is None else p.grad
        p.grad = None
    return taken
