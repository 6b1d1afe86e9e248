"""Check the first batches: the model must not read padding, and weights should not cancel.

Padding. The model must give the same losses for longer padding, up to rounding. Otherwise the
update would depend on which examples share a micro-batch:

    (v_i, n_i) of examples padded to T  =  (v_i, n_i) of the same padded to T' > T

Weights. Mean divides a batch by its own sum of weights. If weights vary, a mean over batches is off
the mean over the data by about

    cv^2 / B,    cv = standard deviation of the weights over their mean, B = examples of a batch
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from anybatch._torch import tree_leaves
from anybatch.batch import Pad
from anybatch.errors import AnybatchError, LossError, ModelError
from anybatch.example_losses import Losses
from anybatch.gradient import Gradient
from anybatch.objective import Objective
from anybatch.pytree import take_examples
from anybatch.randomness import GeneratorStates
from anybatch.reductions import Mean, Reduction, Scaled
from anybatch.training.batches import Batch
from anybatch.training.evaluation import find_device, map_micro_batches

__all__ = ["CountWatch", "check_padding", "watch_padding"]

NUM_COMPARED = 4  # examples
REMEDIES = (
    "Use the mask of the Padded(values, mask) that the model is given: take the last valid state "
    "(at mask.sum(1) - 1, or by pack_padded_sequence), a mean over the mask, attention with it."
)

_log = logging.getLogger(__name__)


def watch_padding(
    batches: Iterator[Batch], model: nn.Module, objective: Objective, pad: Pad
) -> Iterator[Batch]:
    """Pass batches on, and check the model at the first one with several lengths."""
    is_checked = False
    for batch in batches:
        if not is_checked and batch.examples.examples:
            is_checked = check_padding(model, objective, batch.examples.examples, pad)
        yield batch


def check_padding(
    model: nn.Module, objective: Objective, examples: Sequence[Any], pad: Pad
) -> bool:
    """Compare the losses of a few examples at their own padding and at a longer one.

    The shortest examples are padded to the longest of themselves, and to the longest of all. Values
    and counts are equal if they differ by at most sqrt(eps) (1 + |v|), with eps of the coarsest
    parameter: 3e-4 in float32, where the check is sharp, 0.09 in bfloat16. Other shapes may use
    other kernels, which round differently in the last digits. A model that reads padding differs in
    the first digits.

    The model runs in evaluation mode, without autocast and without a graph. Modes, buffers and
    random generators are restored. A model that draws random numbers in evaluation mode is not
    checked, since it draws others for another shape.

    Args:
        model, objective: as in training.
        examples: ragged sequences with their targets, as `pad` takes them, at least one.
        pad: pads them.

    Returns:
        False if all examples have one length, so that nothing was compared.

    Raises:
        ModelError: the model reads padding. The message names the first module whose input or
            output differs at the example's own places. LossError: an example loss reads padding.
            BatchError: see `Pad`.
    """
    pad(examples[:1])  # raises if these are no examples for it
    by_length = sorted(examples, key=lambda example: len(example[0]))
    longest = by_length[-1]
    few = [example for example in by_length if len(example[0]) < len(longest[0])][:NUM_COMPARED]
    if not few:
        return False
    paddings = _Paddings(model, pad, few, longest)
    device, has_drawn = find_device(model), []

    def compute_losses(batch: Any, size: int) -> Losses:
        states = GeneratorStates.capture(device, others=True)
        losses = objective.losses(model, batch, size)
        has_drawn.append(states.has_changed(device))
        return losses

    short, long = paddings.compute(compute_losses)
    tolerance = _choose_tolerance(model)
    differing = _find_differing(short, long, tolerance)
    if len(differing) and not any(has_drawn):
        single = paddings._replace(examples=[few[int(differing[0])]])
        raise _explain(model, objective, single, tolerance)
    return True


class _Paddings(NamedTuple):
    """Examples at two paddings."""

    model: nn.Module
    pad: Pad
    examples: list[Any]
    longest: Any  # the example that sets the length of the longer padding

    def compute(self, function: Callable[[Any, int], Any]) -> list[Any]:
        """Compute a function of (batch, size) at the short and at the long padding."""

        def pad_longer(few: Sequence[Any]) -> Any:
            return take_examples(self.pad([*few, self.longest]), 0, len(few))

        with torch.autocast(find_device(self.model).type, enabled=False):
            return [
                map_micro_batches(self.model, function, self.examples, collate=collate)[0]
                for collate in (self.pad, pad_longer)
            ]

    @property
    def lengths(self) -> tuple[int, int]:
        """T of both paddings."""
        return max(len(example[0]) for example in self.examples), len(self.longest[0])


def _choose_tolerance(model: nn.Module) -> float:
    floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
    return float(max(torch.finfo(dtype).eps for dtype in floats or [torch.float32]) ** 0.5)


def _find_differing(short: Losses, long: Losses, tolerance: float) -> Tensor:
    """Find the examples whose value or count differs."""
    is_equal = []
    for name, term in short.items():
        for a, b in ((term.values, long[name].values), (term.weights, long[name].weights)):
            close = torch.isclose(a.double(), b.double(), tolerance, tolerance, equal_nan=True)
            is_equal.append(close.flatten(1).all(1) if close.ndim > 1 else close)
    return (~torch.stack(is_equal).all(0)).nonzero()[:, 0]


class _Tensors(NamedTuple):
    """Floating tensors in the inputs or outputs of one call of a module."""

    caller: str | None  # the module whose forward made the call; None: outside of all modules
    values: list[Tensor]


Place = tuple[str, str, int]  # module, "input" or "output", number of the call


def _explain(
    model: nn.Module, objective: Objective, paddings: _Paddings, tolerance: float
) -> AnybatchError:
    """Make an error that names what reads padding, from one example that shows it."""

    def record(batch: Any, size: int) -> dict[Place, _Tensors]:
        with _record_calls(model) as calls:
            objective.losses(model, batch, size)
        return calls

    short, long = paddings.compute(record)
    t, longer = paddings.lengths
    what = (
        f"the loss of an example of length {t} changes when it is padded to {longer}. It must stay "
        f"the same"
    )
    for (name, side, number), tensors in short.items():
        other = long.get((name, side, number))
        if other is None or _agree(tensors, other, (t, longer), side, tolerance):
            continue
        if side == "output":
            reader = _format_module(model, name)
        else:
            caller = tensors.caller
            reader = "example_losses" if caller is None else _format_module(model, caller)
        kind = LossError if reader == "example_losses" else ModelError
        return kind(
            f"{what}: {reader} reads padding. Of the model's modules in the order in which they "
            f"run, the {side} of {_format_module(model, name)} is the first that differs. "
            f"{REMEDIES}"
        )
    return LossError(
        f"{what}: example_losses reads padding. No output of a module differs at the example's own "
        f"places. Return ab.ExampleLosses((losses * mask).sum(1), counts=mask.sum(1)) of "
        f"the mask that ab.Pad gives."
    )


@contextmanager
def _record_calls(model: nn.Module) -> Iterator[dict[Place, _Tensors]]:
    """Record inputs and outputs of all modules, in the order in which they run."""
    calls: dict[Place, _Tensors] = {}
    counts: Counter[tuple[str, str]] = Counter()
    running: list[str] = []

    def record(name: str, side: str, things: Any) -> None:
        leaves = [x for x in tree_leaves(things) if isinstance(x, Tensor) and x.is_floating_point()]
        copies = [leaf.detach().clone() for leaf in leaves]
        calls[name, side, counts[name, side]] = _Tensors(running[-1] if running else None, copies)
        counts[name, side] += 1

    handles = []
    for name, module in model.named_modules():

        def before(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            record(name, "input", (args, kwargs))
            running.append(name)

        def after(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
            running.pop()
            record(name, "output", output)

        handles += [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _agree(
    short: _Tensors, long: _Tensors, lengths: tuple[int, int], side: str, tolerance: float
) -> bool:
    """Return whether both are the same at the places of the example, which fills the short one."""
    pairs = list(zip(short.values, long.values, strict=False))
    if side == "output":  # next to a whole sequence, its last state (h_n of a GRU) says nothing yet
        pairs = [(a, b) for a, b in pairs if a.shape != b.shape] or pairs
    for a, b in pairs:
        sizes = [*zip(a.shape, b.shape, strict=False)]
        if a.ndim != b.ndim or any(m != n and (m, n) != lengths for m, n in sizes):
            continue  # its shape is not understood; later modules will show a difference
        same_places = b[tuple(slice(m) for m, _ in sizes)]
        if not (a - same_places).norm() <= tolerance * a.norm():
            return False
    return True


def _format_module(model: nn.Module, name: str) -> str:
    kind = type(model.get_submodule(name)).__name__
    return f"{name!r} ({kind})" if name else f"the model ({kind})"


_NUM_UPDATES = 10  # to look at
_MAX_BIAS = 0.02


class CountWatch:
    """Looks at the weights of the first updates, and warns once.

    Args:
        objective: its terms under Mean without a total are watched.
    """

    def __init__(self, objective: Objective) -> None:
        reductions = objective.reductions.items()
        names = [name for name, r in reductions if _divides_by_batch_weights(r)]
        self._counts = {name: torch.zeros(0) for name in names}
        self._num_left = _NUM_UPDATES
        self.is_done = not names

    def note(self, gradient: Gradient) -> None:
        """Look at the weights of one update on this rank; integers are counts of terms."""
        self._num_left -= 1
        for name, before in list(self._counts.items()):
            counts = gradient.terms[name].counts
            if counts is None or not counts.is_floating_point():
                del self._counts[name]
                continue
            weights = torch.cat([before, counts.detach().float().cpu()])
            self._counts[name] = weights
            mean = float(weights.mean())
            variance = float(weights.var(correction=0))
            bias = variance / mean**2 / gradient.num_examples if mean else 0
            if bias > _MAX_BIAS and not bool((weights == weights.round()).all()):
                self._num_left = 0
                _log.warning(_WARNING, name, gradient.num_examples, bias)
        self.is_done = self._num_left <= 0 or not self._counts


def _divides_by_batch_weights(reduction: Reduction) -> bool:
    while isinstance(reduction, Scaled):
        reduction = reduction.reduction
    return isinstance(reduction, Mean) and reduction.total is None


_WARNING = (
    "The weights of the term %r vary, and a batch has only %d examples. Mean() divides each batch "
    "by its own sum of weights, so their effect fades as batches get smaller (by about %.2g here). "
    "Use ab.Mean(total=weights.mean().item()), with the mean weight of all training data: its "
    "result does not depend on the batch size."
)
