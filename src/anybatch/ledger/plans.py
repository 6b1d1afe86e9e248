"""Where examples lie at each meeting of a model, found once and checked against plain autograd.

    probe      v_i of one example alone goes back: gradients of the others must be 0 (`placement`)
    compare    grad v_i of two examples, and sum_i grad v_i, by parameter, with plain autograd

on a few examples, at the 1st, 10th, 100th, ... step that a model is observed in its present mode:
two forward passes where all is well. Parameters are perturbed meanwhile, so that branches
initialised to 0 produce gradients too. Whatever the passes leave behind is put back (`traces`).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

from anybatch.errors import LedgerError
from anybatch.ledger.coupling import refuse_coupled, same
from anybatch.ledger.moves import Moves
from anybatch.ledger.observer import Pass
from anybatch.ledger.placement import Plan
from anybatch.ledger.taps import SecondDerivative
from anybatch.ledger.traces import remember
from anybatch.randomness import States

__all__ = ["NUM_PROBED", "plan_of"]

NUM_PROBED = 5
"""Examples that pass through: no size that layers often have, so that few shapes are ambiguous."""

_CHECKED = frozenset(10**k for k in range(12))
"""Steps at which this is done, with the examples that are there: the rows of some may be mixed by
chance in the order that they were in."""
_SHAKE = 0.01
_CAUSES = (
    "Are rows of different examples mixed there (packed, routed, sorted), or does the model couple "
    "examples? Keep examples along a dimension of their own, freeze the parameter, or leave the "
    "model unobserved."
)
_UNCONFIRMED = (
    f"Examples cannot be told apart where they meet it, or it is used in two layouts. {_CAUSES}"
)
Values = Callable[[AbstractContextManager[object]], Tensor]
"""The values v [B] of the probed examples, the forward pass made within a context."""
Part = Callable[[int, int], Tensor]
"""The values of the probed examples start .. stop-1 alone."""

_known: WeakKeyDictionary[nn.Module, dict[Any, Plan]] = WeakKeyDictionary()


def plan_of(
    model: nn.Module,
    mode: tuple[bool, ...],
    parameters: Mapping[str, nn.Parameter],
    values: Values,
    part: Part | None = None,
    roots: Iterable[object] = (),
) -> Plan:
    """The model's plan in its present mode. The model is left as it was.

    Args:
        model, mode: what it belongs to.
        parameters: the trainable ones, by name.
        values: makes a forward pass; each call draws the same random numbers.
        part: makes a forward pass of a part of the probed examples; None: there is none.
        roots: the functions, and other objects, that a forward pass may change.

    Raises:
        LedgerError: examples that are coupled, or gradients that plain autograd does not confirm.
    """
    plans, key = _known.setdefault(model, {}), (mode, *parameters)
    known = plans.get(key, Plan())
    known.num_steps += 1
    if known.num_steps not in _CHECKED:
        return known
    plan = Plan(by_copies=known.by_copies, moves=Moves(model.buffers()))
    with _trial(model, parameters, roots) as restore:

        def repeated(context: AbstractContextManager[object]) -> Tensor:
            restore(parameters=False)
            return values(context)

        look = _Look(next(iter(parameters.values())).device)
        plain = repeated(look)
        if len(plain) < 2:  # all that there is belongs to that example
            return Plan()
        if not plain.isfinite().all():
            restore(parameters=True)
            plain = repeated(look)
        try:
            _check(parameters, repeated, plain, plan, look)
        except LedgerError:
            if part is not None and plan.rejected and not look.draws:
                refuse_coupled(model, partial(_halves, part, restore, len(plain)), look.eps)
            raise
    plan.num_steps = known.num_steps
    plans[key] = plan
    return plan


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
        yield restore
    finally:
        restore(parameters=True)
        for p, gradient in zip(own, gradients, strict=True):
            p.grad = gradient


class _Look(TorchFunctionMode):
    """Sees the narrowest type that a forward pass computes in, and whether it draws."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.eps, self.draws = 0.0, False
        self._device = device

    def __enter__(self) -> Self:
        self._states = States.now(self._device, others=True)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.draws |= self._states.drawn(self._device)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and (result.is_floating_point() or result.is_complex()):
            self.eps = max(self.eps, torch.finfo(result.dtype).eps)
            kind = result.device.type
            can_narrow = torch.amp.is_autocast_available(kind)
            if can_narrow and torch.is_autocast_enabled(
                kind
            ):  # inside one call too, such as that of a GRU
                self.eps = max(self.eps, torch.finfo(torch.get_autocast_dtype(kind)).eps)
        return result


def _check(
    parameters: Mapping[str, nn.Parameter], values: Values, plain: Tensor, plan: Plan, look: _Look
) -> None:
    """Fill the plan, and compare values and gradients with those of plain autograd."""
    watched, v = _place(parameters, values, plan, len(plain))
    if not same(v.detach(), plain.detach(), look.eps):
        raise LedgerError(
            f"the losses of a few examples are {plain.tolist()}, but {v.tolist()} when their "
            f"parameters are watched, expected the same: an operation cannot be taken apart by "
            f"example. Leave the model unobserved."
        )
    weights = torch.arange(1, len(v) + 1, dtype=v.dtype, device=v.device)
    found, squares = _by_ledger(parameters, watched, v, weights)
    for i in (0, len(v) - 1):
        chosen = torch.zeros_like(weights)
        chosen[i] = 1
        own = {name: float(rows[i]) for name, rows in squares.items()}
        _compare_squares(own, _by_autograd(parameters, plain, chosen, look), look.eps)
    norms = {
        name: float(weights @ rows.clamp(min=0).sqrt().to(weights))
        for name, rows in squares.items()
    }
    _compare_totals(found, _by_autograd(parameters, plain, weights, look), norms, look.eps)


def _place(
    parameters: Mapping[str, nn.Parameter], values: Values, plan: Plan, size: int
) -> tuple[Pass, Tensor]:
    """Put into the plan the placements for which no loss of one example reaches another; return
    the forward pass for which this holds, and its values."""
    while True:
        watched = Pass(parameters, size, plan)
        try:
            v = values(watched.mode)
        except SecondDerivative:  # which the plan now provides for
            continue
        wrong = set()
        for chosen in torch.eye(size, dtype=torch.bool, device=v.device):
            wrong |= {m for m, _ in watched.probe([v], [torch.ones_like(v)], chosen)}
        if not wrong:
            plan.unsure.clear()
            return watched, v
        for meeting in wrong:
            plan.reject(meeting)


def _compare_squares(
    found: Mapping[str, float], gradients: Mapping[str, Tensor], eps: float
) -> None:
    """Compare |g_i|^2 of one example, by parameter."""
    expected = {name: _norm(g) ** 2 for name, g in gradients.items()}
    for name, square in expected.items():
        own = found.get(name, 0.0)
        slack = min(0.2, 20 * eps**0.5) * max(square, own)
        if abs(own - square) > slack + eps**1.5 * sum(expected.values()):
            raise LedgerError(
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
            raise LedgerError(
                f"The ledger finds another gradient of {name} for a few examples than plain "
                f"autograd. The norm of their difference is {distance:.3g}, that of autograd's is "
                f"{_norm(right):.3g}. {_UNCONFIRMED}"
            )


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))


def _by_ledger(
    parameters: Mapping[str, nn.Parameter], watched: Pass, v: Tensor, weights: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """sum_i c_i g_i, as it goes into `.grad`, and |g_i|^2 [B], by parameter."""
    plan = watched.plan
    _take(parameters)
    try:
        squares = watched.go_back([v], [torch.ones_like(v)], weights=weights).squares
    except LedgerError as error:
        lost = [str(m) for m, place in plan.chosen.items() if place is None and m in plan.rejected]
        if not lost:
            raise
        raise LedgerError(
            f"the loss of one example reaches rows of others at the {' and the '.join(lost)}, "
            f"expected its own rows alone. {_CAUSES}"
        ) from error
    return _take(parameters), squares


def _by_autograd(
    parameters: Mapping[str, nn.Parameter], plain: Tensor, weights: Tensor, look: _Look
) -> dict[str, Tensor]:
    """sum_i c_i g_i by plain autograd."""
    _take(parameters)
    with look:  # checkpointing runs forward again in here, and compares what it saves
        _engine_run_backward((plain,), (weights,), True, False, (), True, True)
    return _take(parameters)


def _take(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """What is in `.grad`, which is then empty."""
    taken = {}
    for name, p in parameters.items():
        taken[name] = torch.zeros_like(p) if p.grad is None else p.grad
        p.grad = None
    return taken
