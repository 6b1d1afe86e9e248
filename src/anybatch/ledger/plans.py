"""Where examples lie at each meeting of a model, found once and checked against plain autograd.

    probe      v_i of one example alone goes back: gradients of the others must be 0 (`placement`)
    compare    |grad v_i|^2 of two examples, by parameter, with plain autograd

on a few examples, at the 1st, 10th, 100th, ... step that a model is observed in its present mode.
Parameters are shaken meanwhile: a branch whose weights begin at 0 would have nothing to show.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from anybatch.errors import LedgerError
from anybatch.ledger.coupling import refuse_coupled, same
from anybatch.ledger.observer import Pass
from anybatch.ledger.placement import Plan
from anybatch.randomness import States

__all__ = ["CHECKED", "NUM_PROBED", "plan_of"]

NUM_PROBED = 5
"""Examples that pass through: no size that layers often have, so that few shapes are ambiguous."""

CHECKED = frozenset(10**k for k in range(12))
"""Steps at which this is done, with the examples that are there: the rows of some may be mixed by
chance in the order that they were in."""
_SHAKE = 0.01
_CAUSES = (
    "Are rows of different examples mixed there (packed, routed, sorted), or does the model couple "
    "examples? Keep examples along a dimension of their own, freeze the parameter, or leave the "
    "model unobserved."
)
Values = Callable[[AbstractContextManager[object]], Tensor]
"""The values v [B] of the probed examples, the forward pass made within a context."""

_known: WeakKeyDictionary[nn.Module, dict[Any, Plan]] = WeakKeyDictionary()


def plan_of(
    model: nn.Module,
    mode: tuple[int, ...],
    parameters: Mapping[str, nn.Parameter],
    values: Values,
    halves: Callable[[], tuple[Tensor, Tensor]] | None,
) -> Plan:
    """The model's plan in its present mode. The model is left as it was.

    Args:
        model, mode: what it belongs to.
        parameters: the trainable ones, by name.
        values: makes a forward pass; each call draws the same random numbers.
        halves: values of the probed examples together, and in two halves; None: it draws.

    Raises:
        LedgerError: examples that are coupled, or figures that plain autograd does not confirm.
    """
    plans, key = _known.setdefault(model, {}), (mode, *parameters)
    known = plans.get(key, Plan())
    known.num_steps += 1
    if known.num_steps not in CHECKED:
        return known
    with _shaken(model, parameters) as restore:

        def repeated(context: AbstractContextManager[object]) -> Tensor:
            restore(buffers=True)
            return values(context)

        look = _Look(next(iter(parameters.values())).device)
        v = repeated(look)
        look.eps = max(look.eps, torch.finfo(v.dtype).eps)  # a GRU's operations give no tensor
        if len(v) < 2:  # all that there is belongs to that example
            return Plan()
        if not v.isfinite().all():
            restore(buffers=False)
        if halves is not None and not look.draws:
            with model.register_forward_pre_hook(lambda *_: restore(buffers=True)):
                refuse_coupled(model, halves, look.eps)
        plan = _found(parameters, repeated, len(v))
        _compare(parameters, repeated, plan, look.eps)
    plan.num_steps = known.num_steps
    plans[key] = plan
    return plan


@contextmanager
def _shaken(
    model: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> Iterator[Callable[..., None]]:
    """Parameters a little off; yields what puts buffers or parameters back, as is done to all."""
    moved: dict[bool, list[Tensor]] = {
        False: list(parameters.values()),
        True: list(model.buffers()),
    }
    kept = {which: [t.detach().clone() for t in state] for which, state in moved.items()}
    gradients = [p.grad for p in parameters.values()]
    hooks = [
        (home, dict(home))
        for p in parameters.values()
        for home in (p._backward_hooks, p._post_accumulate_grad_hooks)
        if home
    ]

    @torch.no_grad()
    def restore(*, buffers: bool) -> None:
        for tensor, value in zip(moved[buffers], kept[buffers], strict=True):
            if not torch.equal(tensor, value):  # a graph may hold it
                tensor.copy_(value)

    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for p in parameters.values():
                p.add_(_SHAKE * torch.randn(p.shape, generator=generator).to(p))
                p.grad = None
        for home, _ in hooks:  # these passes are none of theirs
            home.clear()
        yield restore
    finally:
        restore(buffers=True)
        restore(buffers=False)
        for p, gradient in zip(parameters.values(), gradients, strict=True):
            p.grad = gradient
        for home, kept_hooks in hooks:
            home.update(kept_hooks)


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
        self.draws = self._states.drawn(self._device)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.eps = max(self.eps, torch.finfo(result.dtype).eps)
            kind = result.device.type
            if torch.is_autocast_enabled(kind):  # inside one call too, such as that of a GRU
                self.eps = max(self.eps, torch.finfo(torch.get_autocast_dtype(kind)).eps)
        return result


def _found(parameters: Mapping[str, nn.Parameter], values: Values, size: int) -> Plan:
    """The placements for which no gradient of one example's loss reaches another."""
    plan = Plan()
    while True:
        watched = Pass(parameters, size, plan)
        v = values(watched.mode)
        wrong = set()
        for chosen in torch.eye(size, dtype=torch.bool, device=v.device):
            wrong |= {m for m, _ in watched.probe([v], [torch.ones_like(v)], chosen)}
        if not wrong:
            plan.unsure.clear()
            return plan
        for meeting in wrong:
            plan.reject(meeting)


def _compare(
    parameters: Mapping[str, nn.Parameter], values: Values, plan: Plan, eps: float
) -> None:
    plain = values(nullcontext())
    watched = Pass(parameters, len(plain), plan)
    v = values(watched.mode)
    if not same(v.detach(), plain.detach(), eps):
        raise LedgerError(
            f"the losses of a few examples are {plain.tolist()}, but {v.tolist()} when their "
            f"parameters are watched, expected the same: an operation cannot be taken apart by "
            f"example. Leave the model unobserved."
        )
    try:
        found = watched.backward([v], [torch.ones_like(v)]).squares
    except LedgerError as error:
        lost = [str(m) for m, place in plan.chosen.items() if place is None and m in plan.rejected]
        if not lost:
            raise
        raise LedgerError(
            f"the loss of one example reaches rows of others at the {' and the '.join(lost)}, "
            f"expected its own rows alone. {_CAUSES}"
        ) from error
    for example in (0, len(v) - 1):
        came = {name: float(squares[example]) for name, squares in found.items()}
        expected = _plain_squares(parameters, plain, example)
        for name, square in expected.items():
            own = came.get(name, 0.0)
            slack = min(0.2, 20 * eps**0.5) * max(square, own)
            if abs(own - square) > slack + eps**1.5 * sum(expected.values()):
                raise LedgerError(
                    f"the ledger finds {own:.6g} for the squared gradient of {name} of one "
                    f"example, plain autograd {square:.6g}, expected the same: examples cannot be "
                    f"told apart where they meet it, or it is used in two layouts. {_CAUSES}"
                )


def _plain_squares(
    parameters: Mapping[str, nn.Parameter], values: Tensor, example: int
) -> dict[str, float]:
    """|grad v_i|^2 by parameter; by `backward`, which reentrant checkpointing needs."""
    for p in parameters.values():
        p.grad = None
    torch.autograd.backward(values, _one(values, example), retain_graph=True)
    return {
        name: 0.0 if p.grad is None else float(p.grad.double().square().sum())
        for name, p in parameters.items()
    }


def _one(values: Tensor, example: int) -> Tensor:
    chosen = torch.zeros_like(values)
    chosen[example] = 1
    return chosen
