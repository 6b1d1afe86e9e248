"""Whether a model reads the padding of ragged sequences.

    (v_i, n_i) of examples padded to T  =  (v_i, n_i) of the same padded to T' > T

up to rounding: else the update would depend on which examples share a micro-batch.
"""

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
from anybatch.objective import Objective
from anybatch.pytree import take_examples
from anybatch.randomness import GeneratorStates
from anybatch.training.batches import Batch
from anybatch.training.evaluation import device_of, outputs

__all__ = ["check_padding", "watch_padding"]

NUM_COMPARED = 4  # examples
REMEDIES = (
    "Use the mask of the Padded(values, mask) that the model is given: take the last valid state "
    "(at mask.sum(1) - 1, or by pack_padded_sequence), a mean over the mask, attention with it."
)


def watch_padding(
    found: Iterator[Batch], model: nn.Module, objective: Objective, collate: object
) -> Iterator[Batch]:
    """Pass batches on; before the first of several lengths, see that the model reads no padding."""
    is_checked = False
    for batch in found:
        if isinstance(collate, Pad) and not is_checked and batch.examples.examples:
            is_checked = check_padding(model, objective, batch.examples.examples, collate)
        yield batch


def check_padding(
    model: nn.Module, objective: Objective, examples: Sequence[Any], pad: Pad
) -> bool:
    """Compare the losses of a few examples at their own padding and at a longer one.

    The shortest are padded to the longest of themselves, then to the longest of all, which is no
    longer than what the model is to be trained on. Values and counts are equal if they differ by
    at most sqrt(eps) (1 + |v|), eps that of the coarsest parameter: 3e-4 in float32, where the
    check is sharp, 0.09 in bfloat16. Kernels may change with the shape and then round otherwise,
    in the last digits; what is read from padding shows in the first half of them.

    The model is in evaluation mode, without autocast and without a graph; modes, buffers and
    random generators are afterwards as before. One that draws random numbers even so draws others
    for another shape, and passes unseen.

    Args:
        model, objective: as in training.
        examples: ragged sequences with their targets, as `pad` takes them, at least one.
        pad: how they are padded.

    Returns:
        False where all examples are of one length, so that none is padded: ask again with others.

    Raises:
        ModelError: a model that reads padding; it names the first module, in the order in which
            they run, whose output or input at the examples' own places shows it.
        LossError: an example loss that reads padding; BatchError: see `Pad`.
    """
    pad(examples[:1])  # refuses what is no example
    ordered = sorted(examples, key=lambda example: len(example[0]))
    few = [example for example in ordered if len(example[0]) < len(ordered[-1][0])][:NUM_COMPARED]
    if not few:
        return False
    paddings = _Paddings(model, pad, few, ordered[-1])
    device, drawn = device_of(model), []

    def losses_of(batch: Any, size: int) -> Losses:
        states = GeneratorStates.capture(device, others=True)
        losses = objective.losses(model, batch, size)
        drawn.append(states.has_changed(device))
        return losses

    short, long = paddings.run(losses_of)
    tolerance = _tolerance(model)
    differing = _differing(short, long, tolerance)
    if len(differing) and not any(drawn):
        one = paddings._replace(examples=[few[int(differing[0])]])
        raise _first_reader(model, objective, one, tolerance)
    return True


class _Paddings(NamedTuple):
    """Examples at two paddings."""

    model: nn.Module
    pad: Pad
    examples: list[Any]
    longest: Any  # the example that the longer padding reaches up to

    def run(self, function: Callable[[Any, int], Any]) -> list[Any]:
        """What a function of (batch, size) gives at their own padding, and at the longer one."""

        def longer(few: Sequence[Any]) -> Any:
            return take_examples(self.pad([*few, self.longest]), 0, len(few))

        with torch.autocast(device_of(self.model).type, enabled=False):
            return [
                outputs(self.model, function, self.examples, collate=collate)[0]
                for collate in (self.pad, longer)
            ]

    @property
    def lengths(self) -> tuple[int, int]:
        """T of both."""
        return max(len(example[0]) for example in self.examples), len(self.longest[0])


def _tolerance(model: nn.Module) -> float:
    floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
    return float(max(torch.finfo(dtype).eps for dtype in floats or [torch.float32]) ** 0.5)


def _differing(short: Losses, long: Losses, tolerance: float) -> Tensor:
    """Which examples have another value or count."""
    same = []
    for name, term in short.items():
        for a, b in ((term.values, long[name].values), (term.weights, long[name].weights)):
            close = torch.isclose(a.double(), b.double(), tolerance, tolerance, equal_nan=True)
            same.append(close.flatten(1).all(1) if close.ndim > 1 else close)
    return (~torch.stack(same).all(0)).nonzero()[:, 0]


class _Seen(NamedTuple):
    """What a module was given, or has given."""

    caller: str | None  # the module in whose forward it was called, None: in no module's
    floats: list[Tensor]


Place = tuple[str, str, int]  # module, "input" or "output", how many times before


def _first_reader(
    model: nn.Module, objective: Objective, paddings: _Paddings, tolerance: float
) -> AnybatchError:
    """The error that names what reads padding, of one example that shows it."""

    def seen(batch: Any, size: int) -> dict[Place, _Seen]:
        with _recorded(model) as record:
            objective.losses(model, batch, size)
        return record

    short, long = paddings.run(seen)
    t, longer = paddings.lengths
    came = (
        f"the loss of an example of length {t} changes when it is padded to {longer}, expected "
        f"the same: "
    )
    for (name, side, times), one in short.items():
        other = long.get((name, side, times))
        if other is None or _agree(one, other, (t, longer), side, tolerance):
            continue
        if side == "output":
            reader = _spelt(model, name)
        else:
            reader = "example_losses" if one.caller is None else _spelt(model, one.caller)
        kind = LossError if reader == "example_losses" else ModelError
        return kind(
            f"{came}{reader} reads padding. Of the model's modules in the order in which they "
            f"run, the {side} of {_spelt(model, name)} is the first that differs. {REMEDIES}"
        )
    return LossError(
        f"{came}example_losses reads padding. No output of a module differs at the example's own "
        f"places. Return ab.ExampleLosses((losses * mask).sum(1), counts=mask.sum(1)) of "
        f"the mask that ab.Pad gives."
    )


@contextmanager
def _recorded(model: nn.Module) -> Iterator[dict[Place, _Seen]]:
    """Inputs and outputs of all modules, in the order in which they run."""
    record: dict[Place, _Seen] = {}
    times: Counter[tuple[str, str]] = Counter()
    running: list[str] = []

    def note(name: str, side: str, things: Any) -> None:
        leaves = [x for x in tree_leaves(things) if isinstance(x, Tensor) and x.is_floating_point()]
        copies = [leaf.detach().clone() for leaf in leaves]
        record[name, side, times[name, side]] = _Seen(running[-1] if running else None, copies)
        times[name, side] += 1

    handles = []
    for name, module in model.named_modules():

        def before(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            note(name, "input", (args, kwargs))
            running.append(name)

        def after(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
            running.pop()
            note(name, "output", output)

        handles += [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        ]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _agree(one: _Seen, other: _Seen, lengths: tuple[int, int], side: str, tolerance: float) -> bool:
    """Whether both are the same at the places of the one example, which fills the first."""
    pairs = list(zip(one.floats, other.floats, strict=False))
    if side == "output":  # beside the sequence itself, its end (h_n of a GRU) says nothing yet
        pairs = [(a, b) for a, b in pairs if a.shape != b.shape] or pairs
    for a, b in pairs:
        sizes = [*zip(a.shape, b.shape, strict=False)]
        if a.ndim != b.ndim or any(m != n and (m, n) != lengths for m, n in sizes):
            continue  # of another form: what comes later will tell
        own = b[tuple(slice(m) for m, _ in sizes)]
        if not (a - own).norm() <= tolerance * a.norm():
            return False
    return True


def _spelt(model: nn.Module, name: str) -> str:
    kind = type(model.get_submodule(name)).__name__
    return f"{name!r} ({kind})" if name else f"the model ({kind})"
