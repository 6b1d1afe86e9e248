"""Self-check on the model at hand: the same gradient, however a batch is cut.

    G    of a few examples, uncut, by plain autograd
    H    of the same examples, cut in two, by the machinery of `data_term`

    |G_p - H_p|  <=  tolerance * max(S_p, S / 1000)      for each parameter p

S_p is the sum of the norms of G_p and of the micro-batches' gradients, so that a model at its
optimum, where they cancel, is no false alarm; S is the same over all parameters. Rounding stays
under half of the tolerance in all sound models that were tried. The losses are compared as well,
and what a forward pass changes: parameters, buffers, Python attributes (`trial`).

The check runs before the 1st, 10th, 100th, ... update in which the batch is cut, on a copy of the
model, with autocast off; under autocast once more, for gross faults.
"""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from anybatch.errors import LossError, ModelError
from anybatch.gradient.survey import NewFact
from anybatch.gradient.trial import (
    Subject,
    Trial,
    copy_model,
    preserve_everything,
    preserve_state,
    try_attributes,
    try_layouts,
    use_live_model,
)
from anybatch.gradient.update import Update
from anybatch.layout import MicroBatch, ShareRange
from anybatch.pytree import list_sizes, take_few

_log = logging.getLogger(__name__)

__all__ = ["check_layouts", "explain", "is_due", "postpone"]

NUM_EXAMPLES = 8
_TOLERANCE = {torch.finfo(torch.float64).eps: 1e-12, torch.finfo(torch.float32).eps: 1e-5}
_ROUNDINGS = 64  # tolerance of narrower types, in units of their rounding
_GRAIN_FACTOR = 100  # of the tolerance: batch norm of few examples cancels most of a gradient
_FLOOR = 1e-3  # of the norm over all parameters: a smaller one is compared to this
CHECKED = frozenset(10**k for k in range(12))
_OFF = "self_check=False leaves this check out."


class _Mismatch(Exception):
    """Says what depends on the cut."""


def is_due(update: Update, *, is_cut: bool) -> bool:
    """Count an update, and return whether it is to be checked."""
    facts = update.facts
    if is_cut:
        facts.num_cut += 1
    else:
        facts.num_uncut += 1
    if update.survey.units or not update.self_check:
        return False
    if is_cut:
        return facts.num_cut in CHECKED
    return update.self_check == "run" and facts.num_uncut in CHECKED


def postpone(update: Update, *, is_cut: bool) -> None:
    """Uncount an update whose check was not confirmed, so that the next one is checked."""
    if is_cut:
        update.facts.num_cut -= 1
    else:
        update.facts.num_uncut -= 1


def check_layouts(
    update: Update, micro_batches: Sequence[MicroBatch], *, is_cut: bool
) -> Exception | None:
    """Compare a few examples uncut and cut. The model is restored.

    Args:
        update: the next update.
        micro_batches: those of this rank's share.
        is_cut: whether the batch is cut; if not, only attributes are compared.

    Returns:
        An error that prevented the check. Raise it after the update: if the update itself fails,
        its own error says more.

    Raises:
        ModelError: the gradient, or what the model changes, depends on the cut.
    """
    largest = max((m.size for m in micro_batches), default=0)
    share = max(list_sizes(update.share) or (update.share_range.size,))
    for size in dict.fromkeys(min(n, share) for n in (max(4, largest), max(2, largest))):
        if size >= 2:
            with suppress(torch.OutOfMemoryError):  # perhaps fewer examples fit
                return _check_few(update, min(size & ~1, NUM_EXAMPLES), is_cut=is_cut)
    if share >= 2:
        _log.warning("The layout was not checked: a few examples do not fit in memory at once.")
    return None


def _check_few(update: Update, size: int, *, is_cut: bool) -> Exception | None:
    few = replace(
        update,
        share=take_few(update.share, size),
        share_range=ShareRange(0, size, size),
        ids=None,
        group=None,
        loss_scale=1.0,
        observation=None,
        grain_norms=None,
        is_bitwise=False,
        outputs=[],
    )
    compare = _compare if is_cut else _compare_state
    problem: Exception | None = None
    with preserve_everything(update):
        for precision in dict.fromkeys(("float32", update.precision)):
            try:
                _check(replace(few, precision=precision), compare)
                problem = None
            except _Mismatch as mismatch:
                raise ModelError(str(mismatch)) from None
            except (NewFact, LossError):
                continue  # the update raises it too, unless only these examples do
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                problem = error
    return problem if is_cut else None


def explain(problem: Exception) -> ModelError:
    """Make the user's error of an exception that prevented the check."""
    if isinstance(problem, ModelError):  # it names its cause
        return problem
    return ModelError(
        f"The layout cannot be checked: on a few examples of the batch, uncut or cut in two, the "
        f"model or the loss fails with {type(problem).__name__}: {problem} Let both take any "
        f"number of examples. {_OFF}"
    )


def _check(update: Update, compare: Callable[[Update, Subject], None]) -> None:
    """Check on a copy; on the model itself if it cannot be copied, or if the loss holds it."""
    live = update.survey.parameters
    _clear(live)
    try:
        with preserve_state(update):  # a loss may hold the live model
            compare(update, Subject(copy_model(update), live))
    except (_Mismatch, LossError, torch.OutOfMemoryError):
        raise
    except Exception:
        is_enough = False
    else:
        is_enough = all(p.grad is None for p in live.values()) or compare is _compare_state
    if is_enough:
        return
    _clear(live)
    try:
        with use_live_model(update) as subject:
            compare(update, subject)
    finally:
        _clear(live)


def _clear(parameters: dict[str, nn.Parameter]) -> None:
    for p in parameters.values():
        p.grad = None


def _compare(update: Update, subject: Subject) -> None:
    """Raise a mismatch if any result differs when the examples are cut."""
    trial = try_layouts(update, subject)
    tolerance = _TOLERANCE.get(trial.eps, _ROUNDINGS * trial.eps)
    if trial.is_in_grains:
        tolerance *= _GRAIN_FACTOR
    _compare_parameters(update, trial, tolerance)
    _compare_attributes(trial, tolerance)
    _compare_buffers(trial, tolerance)
    _compare_gradients(trial, tolerance)


def _compare_parameters(update: Update, trial: Trial, tolerance: float) -> None:
    changed = trial.uncut.parameters.keys() | trial.cut.parameters.keys()
    wrong = [
        name
        for name in changed
        if name not in trial.uncut.parameters
        or name not in trial.cut.parameters
        or _differ(trial.uncut.parameters[name], trial.cut.parameters[name], tolerance)
    ]
    if wrong:
        raise _Mismatch(
            f"The forward pass changes the parameter {wrong[0]}, and it ends up with another value "
            f"when the batch is cut. Initialise from data, and change weights, before training or "
            f"between updates; or run the batch uncut. {_OFF}"
        )
    update.facts.changed_parameters |= changed


def _compare_attributes(trial: Trial, tolerance: float) -> None:
    for name, losses in trial.attributes.items():
        if losses is None or _largest_difference(losses, trial.uncut.values) > tolerance:
            raise _Mismatch(
                f"The forward pass changes the attribute {name!r}, and the next forward pass "
                f"depends on it. Each micro-batch would find another value, and a run that goes on "
                f"from a checkpoint would not find it at all. Pass such state as part of the "
                f"batch, or in a buffer that changes between updates. Put objects that hold it in "
                f"state={{...}}. {_OFF}"
            )


def _compare_state(update: Update, subject: Subject) -> None:
    """Raise a mismatch if losses depend on an attribute that a forward pass changes."""
    trial = try_attributes(update, subject)
    _compare_attributes(trial, _TOLERANCE.get(trial.eps, _ROUNDINGS * trial.eps))


def _compare_buffers(trial: Trial, tolerance: float) -> None:
    for name, whole in trial.uncut.buffers.items():
        if _differ(whole, trial.cut.buffers[name], 10 * tolerance):
            raise _Mismatch(
                f"The forward pass changes the buffer {name}, and it ends up with another value "
                f"when the batch is cut: the mean over micro-batches, which is right for running "
                f"means, is wrong for a sum, a maximum or a codebook. Update it between updates, "
                f"or run the batch uncut. {_OFF}"
            )


def _compare_gradients(trial: Trial, tolerance: float) -> None:
    total = math.hypot(*trial.scales.values())
    is_coupled = _is_finite(trial.uncut.values) and not _is_finite(trial.cut.values)
    if not math.isfinite(total) and not is_coupled:
        return  # the update raises an error for it
    distances = {
        name: float(torch.linalg.vector_norm(difference)) / max(trial.scales[name], _FLOOR * total)
        for name, difference in trial.differences.items()
        if total != 0  # nan too
    }
    worst = sorted(distances, key=lambda name: -distances[name])[:3]
    if not worst or distances[worst[0]] <= tolerance:
        return
    listing = ", ".join(f"{name} by {distances[name]:.1e}" for name in worst)
    if _largest_difference(trial.cut.values, trial.uncut.values) > tolerance:
        cause = (
            "The losses of the examples change too: the model or the loss couples examples, by "
            "an operation along the batch. Put a loss across the batch into the reduction; or "
            "use ab.Objective(grain=...) and a layer that is known to couple, such as "
            "nn.BatchNorm1d."
        )
    else:
        cause = (
            "The losses of the examples are the same, so the backward pass differs. A hook, or a "
            "torch.autograd.Function, is not linear in the gradient, such as one that clamps or "
            "normalises; or examples act on each other through derivatives."
        )
    raise _Mismatch(
        f"The gradient of {trial.num_examples} examples depends on how they are cut. Relative "
        f"differences: {listing}; rounding allows {tolerance:.0e}. {cause} {_OFF}"
    )


def _differ(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape:
        return False  # a cache
    if not (a.is_floating_point() or a.is_complex()):
        return not torch.equal(a, b)
    same = (a == b) | (a.isnan() & b.isnan())
    distance = float(torch.linalg.vector_norm((a - b).masked_fill(same, 0)))
    scale = sum(float(torch.linalg.vector_norm(one[one.isfinite()])) for one in (a, b))
    return not distance <= tolerance * scale  # nan too


def _largest_difference(values: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """Find the largest difference of losses, relative to their mean size."""
    largest = 0.0
    for name, v in values.items():
        other = others[name]
        same = (v == other) | (v.isnan() & other.isnan())
        scale = float(other[other.isfinite()].abs().mean()) or 1.0
        difference = ((v - other).abs() / scale).nan_to_num(math.inf, math.inf)
        largest = max(largest, float(difference.masked_fill(same, 0).max()))
    return largest


def _is_finite(values: dict[str, Tensor]) -> bool:
    return all(bool(v.isfinite().all()) for v in values.values())
