"""Calibration: find the placements of a model's sites once, and check them by plain autograd.

    probe      v_i of one example alone goes backward: gradients of the others must be 0
    compare    |grad v_i|^2 and sum_i c_i grad v_i, by parameter, with plain autograd
    halve      v(x_1 .. x_B) = v(x_1 .. x_b), v(x_(b+1) .. x_B)  unless the model couples examples

This happens on a few examples, at the 1st, 10th, 100th, ... step that a model is observed in its
present mode. It takes two forward passes if all is well. Parameters are perturbed slightly, so that
branches initialised to 0 produce gradients too, and everything is restored afterwards
(`trial_run`).
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from anybatch._torch import tree_leaves
from anybatch.errors import LedgerError
from anybatch.ledger.contractions.placement import Plan
from anybatch.ledger.gradient_taps import SecondDerivative
from anybatch.ledger.graph_form import GraphForm
from anybatch.ledger.graph_pass import find_form
from anybatch.ledger.plain_autograd import CAUSES, Reference, make_reference, pop_grads
from anybatch.ledger.row_moves import RowMoves
from anybatch.ledger.trial_run import (
    ForwardProbe,
    convert_errors,
    perturb_parameters,
    preserve_grads,
)
from anybatch.ledger.unplaced import UnplacedError
from anybatch.ledger.watched_pass import WatchedPass
from anybatch.model_facts import find_record

__all__ = ["CHECKED_STEPS", "NUM_PROBED", "Forward", "Part", "find_plan", "replace_plan"]

NUM_PROBED = 5
"""Examples of a calibration. Layers rarely have this size, so few shapes are ambiguous."""
CHECKED_STEPS = frozenset(10**k for k in range(12))
"""Steps of a new calibration. In the batch before, rows may have lain in order by chance."""
_MAX_ROUNDS = 50  # of the search for placements; a tensor has few, and each round rejects some

Forward = Callable[[AbstractContextManager[object]], Tensor]
"""Compute the values v [B] of the probed examples, the forward pass made within a context."""
Part = Callable[[int, int], Tensor]
"""Compute the values of the probed examples start .. stop-1 alone."""
Pairs = Callable[[AbstractContextManager[object], Callable[[], None]], tuple[Tensor, Tensor]]
"""Compute values of some examples in two ways, within a context and after a call."""
Restore = Callable[..., None]


@dataclass(slots=True)
class _Plans:
    """Plans of a model, by its mode, the kind of calibration and the names of the parameters."""

    by_mode: dict[tuple[object, ...], Plan] = field(default_factory=dict)


def find_plan(
    model: nn.Module,
    mode: tuple[int, ...],
    parameters: Mapping[str, nn.Parameter],
    forward: Forward,
    part: Part | None = None,
    roots: Iterable[object] = (),
    coupling: str | None = None,
    repeats: Pairs | None = None,
) -> Plan:
    """Return the model's plan in its present mode. The model is left as it was.

    Args:
        mode: key of the plan, besides the names of the parameters.
        parameters: the trainable ones, by name.
        forward: makes a forward pass; each call draws the same random numbers.
        part: makes a forward pass of some of the probed examples; None: not possible.
        roots: functions and other objects that a forward pass can change.
        coupling: sentence about a layer that couples examples unless all below it is frozen.
        repeats: computes values of some examples among others, and among copies of themselves. If
            these are equal, examples can go backward one at a time without a plan; None: they
            cannot.

    Raises:
        LedgerError: examples are coupled, or plain autograd does not confirm the gradients.
    """
    plans = find_record(model, _Plans).by_mode
    key = (mode, repeats is None, *parameters)
    stored = plans.get(key) or Plan()
    stored.num_steps += 1
    if stored.num_steps not in CHECKED_STEPS or stored.one_by_one is not None:
        return stored
    plan = Plan(needs_copies=stored.needs_copies, row_moves=RowMoves(model.buffers()))
    probe = ForwardProbe(next(iter(parameters.values())).device)
    with perturb_parameters(model, parameters, roots) as restore:
        restored = _restore_first(forward, restore)
        reference = _make_finite_reference(parameters, restored, probe, restore)
        if len(reference.values) < 2:  # everything belongs to the only example
            return Plan()
        form = _find_form(parameters, reference, probe.eps)
        try:
            with convert_errors():
                watched = _fill_plan(parameters, restored, reference, plan, probe.eps)
            if not (plan.has_rows or watched.mode.may_mix):
                plan.graph = form
        except LedgerError as error:
            if plan.rejections and coupling is not None:
                raise _coupling_error(coupling) from error
            if plan.rejections and part is not None and not probe.draws:
                halves = partial(_compute_halves, part, restore, len(reference.values))
                _refuse_coupled(model, halves, probe.eps)
            plan = _go_one_by_one(stored, error, probe, repeats, restore)
    plan.is_linear = reference.is_linear(probe.eps)
    plan.num_steps = stored.num_steps
    plans[key] = plan
    return plan


def _restore_first(forward: Forward, restore: Restore) -> Forward:
    """Return a forward pass that restores all but the parameters first."""

    def run(context: AbstractContextManager[object]) -> Tensor:
        restore(parameters=False)
        return forward(context)

    return run


def replace_plan(
    plan: Plan,
    error: UnplacedError,
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    roots: Iterable[object],
    repeats: Pairs,
) -> None:
    """Change a plan that failed at a step, so that the step can be repeated."""
    if not error.is_replaced:
        probe = ForwardProbe(next(iter(parameters.values())).device)
        with perturb_parameters(model, parameters, roots) as restore:
            _go_one_by_one(plan, error, probe, repeats, restore)


def _go_one_by_one(
    plan: Plan, error: LedgerError, probe: ForwardProbe, repeats: Pairs | None, restore: Restore
) -> Plan:
    """Take examples backward one at a time, if none changes with its neighbours."""
    if repeats is None or not isinstance(error, UnplacedError):
        raise error
    if not _is_close(*repeats(probe, partial(restore, parameters=False)), probe.eps):
        raise UnplacedError(
            f"The loss of an example changes with its neighbours in the batch, so that losses of "
            f"some examples reach rows of others: the model couples examples. Use GroupNorm or "
            f"LayerNorm for BatchNorm, put a loss across the batch into the reduction, or leave "
            f"the model unobserved. The first sign of it: {error}"
        ) from error
    plan.go_one_by_one(str(error))
    return plan


def _make_finite_reference(
    parameters: Mapping[str, nn.Parameter], forward: Forward, probe: ForwardProbe, restore: Restore
) -> Reference:
    """Compute plain autograd's gradients, of unperturbed parameters if the others overflow."""
    v = forward(probe)
    probe.eps = max(probe.eps, torch.finfo(v.dtype).eps)  # a GRU returns a tuple, not a tensor
    if not v.isfinite().all():
        restore(parameters=True)
        v = forward(probe)
    return make_reference(parameters, v, probe)


def _fill_plan(
    parameters: Mapping[str, nn.Parameter],
    forward: Forward,
    reference: Reference,
    plan: Plan,
    eps: float,
) -> WatchedPass:
    """Find the placements, and compare values and gradients with plain autograd's."""
    watched, v = _find_placements(parameters, forward, plan, len(reference.values))
    if not _is_close(v.detach(), reference.values, eps):
        raise UnplacedError(
            f"The losses of a few examples are {reference.values.tolist()}, but {v.tolist()} when "
            f"the ledger watches the parameters. They should agree: the ledger cannot take an "
            f"operation apart by example. Leave the model unobserved."
        )
    pop_grads(parameters)
    try:
        with preserve_grads([v], but=parameters.values()):
            stats = watched.go_back([v], [torch.ones_like(v)], weights=reference.weights)
    except UnplacedError as error:
        without = [s for s, place in plan.placements.items() if place is None]
        names = [str(site) for site in without if site in plan.rejections]
        if not names:
            raise
        raise UnplacedError(
            f"The loss of one example reaches rows of others at the {' and the '.join(names)}. "
            f"{CAUSES}"
        ) from error
    reference.compare(pop_grads(parameters), stats.squares, eps)
    return watched


def _find_form(
    parameters: Mapping[str, nn.Parameter], reference: Reference, eps: float
) -> GraphForm | None:
    """Find the form of the reference's graph; None: plain autograd does not confirm its norms."""
    pop_grads(parameters)
    with preserve_grads([reference.graph], but=parameters.values()):
        result = find_form(parameters, reference.graph, reference.weights)
    total = pop_grads(parameters)
    if result is None:
        return None
    form, stats = result
    squares = {name: rows / reference.weights**2 for name, rows in stats.squares.items()}
    try:
        reference.compare(total, squares, eps)
    except UnplacedError:
        return None
    return form


def _find_placements(
    parameters: Mapping[str, nn.Parameter], forward: Forward, plan: Plan, size: int
) -> tuple[WatchedPass, Tensor]:
    """Find placements with which no loss of one example reaches another.

    Returns:
        The forward pass with these placements, and its values.
    """
    for _ in range(_MAX_ROUNDS):
        watched = WatchedPass(parameters, size, plan)
        try:
            v = forward(watched.mode)
        except SecondDerivative:  # the plan provides for it from now on
            continue
        with preserve_grads([v]):
            wrong = watched.find_misplaced([v], [torch.ones_like(v)])
        if not wrong:
            plan.unconfirmed.clear()
            return watched, v
        for site, placement in wrong:
            plan.reject(site, placement)
    raise UnplacedError(f"No placement of the examples fits the operations of this model. {CAUSES}")


def _coupling_error(sentence: str) -> LedgerError:
    return LedgerError(
        f"{sentence}, and parameters below it are trained, so that no gradient belongs to one "
        f"example alone. Put it in evaluation mode, use GroupNorm or LayerNorm in its place, "
        f"freeze all that is below it, or look at grains: ab.Observe(norms=False, "
        f"grain_norms=True)."
    )


def _compute_halves(part: Part, restore: Restore, size: int) -> tuple[Tensor, Tensor]:
    """Compute the values of some examples together, and of the same in two halves."""
    values = []
    for start, stop in [(0, size), (0, size // 2), (size // 2, size)]:
        restore(parameters=False)
        values.append(part(start, stop).detach())
    return values[0], torch.cat(values[1:])


def _refuse_coupled(
    model: nn.Module, halves: Callable[[], tuple[Tensor, Tensor]], eps: float
) -> None:
    """Check that losses stay the same when the batch is halved.

    Args:
        model: for the name of the module.
        halves: computes values [B] of some examples together, and of the same in two halves.
        eps: rounding of the narrowest type.
    """
    with warnings.catch_warnings():  # about a backward pass; there is none
        warnings.simplefilter("ignore")
        try:
            values = halves()
        except RuntimeError:  # the forward pass differentiates, and has no graph here
            return
        if not _is_close(*values, eps):
            _refuse_first_change(model, halves, eps)


def _refuse_first_change(model: nn.Module, halves: Callable[[], Any], eps: float) -> NoReturn:
    outputs: list[tuple[str, Tensor]] = []
    names = {module: name for name, module in model.named_modules() if name}

    def record(module: nn.Module, args: Any, output: Any) -> None:
        for leaf in tree_leaves(output) if module in names else ():
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                outputs.append((f"the {type(module).__name__} {names[module]!r}", leaf.detach()))

    # A global hook leaves the hooks of the model alone, which `halves` restores.
    handle = register_module_forward_hook(record)
    try:
        halves()
    finally:
        handle.remove()
    third = len(outputs) // 3
    passes = zip(outputs[:third], outputs[third : 2 * third], outputs[2 * third :], strict=False)
    place = "the model's own forward or the loss"
    for (name, whole), (_, first), (_, second) in passes:
        if not _is_concatenation(whole, first, second, eps):
            place = name
            break
    raise LedgerError(
        f"The losses of a few examples change when the batch is halved, from {place} on. The model "
        f"couples examples, and no gradient belongs to one of them. Use GroupNorm or LayerNorm for "
        f"BatchNorm, attend over dimensions that examples do not share, put a loss across the "
        f"batch into the reduction, or leave it unobserved."
    )


def _is_concatenation(whole: Tensor, first: Tensor, second: Tensor, eps: float) -> bool:
    """Return whether two tensors make a third when joined along some dimension, or are equal."""
    a, b, c = (list(t.shape) for t in (whole, first, second))
    if a == b == c:
        return _is_close(whole, first, eps)
    dims = [
        k
        for k in range(len(a))
        if len(a) == len(b) == len(c) and [*a[:k], b[k] + c[k], *a[k + 1 :]] == a
    ]
    return any(_is_close(whole, torch.cat([first, second], k), eps) for k in dims)


def _is_close(x: Tensor, y: Tensor, eps: float) -> bool:
    """Return whether two tensors differ only by rounding; eps is that of one operation."""
    mean = float(y.nan_to_num(0, 0, 0).abs().mean())
    return torch.allclose(x, y, rtol=eps**0.6, atol=eps**0.6 * mean, equal_nan=True)
