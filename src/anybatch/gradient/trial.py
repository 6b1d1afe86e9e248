"""Passes over a few examples, cut and uncut, for `self_check`. They leave nothing behind."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from anybatch import pytree
from anybatch._torch import run_backward
from anybatch.compiled import unwrap
from anybatch.errors import LossError
from anybatch.example_losses import Losses, concatenate_losses
from anybatch.gradient.accumulate import Accumulator
from anybatch.gradient.attempts import Drew, NeedsGraph
from anybatch.gradient.attributes import Attributes, Change
from anybatch.gradient.buckets import watch_gradients
from anybatch.gradient.buffers import Buffers
from anybatch.gradient.closures import contents_kept
from anybatch.gradient.forward_writes import Writes, copy_of
from anybatch.gradient.parameter_hooks import hooks_of
from anybatch.gradient.passes import run
from anybatch.gradient.survey import add_outside_modules, survey_model
from anybatch.gradient.update import Update
from anybatch.kernels.choice import use_torch_kernels
from anybatch.layout import Layout, MicroBatch, cut_grains
from anybatch.ledger.trial_run import ForwardProbe
from anybatch.ledger.watched_pass import disable_compile
from anybatch.precision import autocast
from anybatch.randomness import preserve_generators, seed_generators
from anybatch.reductions import Reduced, Sum

__all__ = [
    "Subject",
    "Trial",
    "attributes_of",
    "live_state_kept",
    "live_subject",
    "probing",
    "trial_of",
    "twin_of",
]

# Made as they are imported, where a type checker does not see them. The older switches for the same
# (`set_float32_matmul_precision`, `allow_tf32`) raise once somebody has used these.
_backends: Any = torch.backends
_OPERATIONS = [
    *(_backends.mkldnn.matmul, _backends.mkldnn.conv, _backends.mkldnn.rnn),
    *(_backends.cuda.matmul, _backends.cudnn.conv, _backends.cudnn.rnn),
]
"""Operations that may compute float32 in a narrower type."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to try, and its parameters as they were."""

    model: nn.Module
    originals: Mapping[str, Tensor]

    @torch.no_grad()
    def put_back(self, parameters: Mapping[str, Tensor]) -> None:
        """Give parameters that a pass has changed their values again."""
        for name, p in parameters.items():
            if not torch.equal(p, self.originals[name]):
                p.copy_(self.originals[name])


@dataclass(slots=True)
class Outcome:
    """Losses of a few examples, and the values of what the passes have changed."""

    values: dict[str, Tensor]
    buffers: dict[str, Tensor]
    parameters: dict[str, Tensor]


@dataclass(slots=True)
class Trial:
    """All that a few examples have shown, uncut and cut."""

    num_examples: int
    is_in_grains: bool
    uncut: Outcome
    cut: Outcome
    differences: dict[str, Tensor]  # of the gradients, by parameter
    scales: dict[str, float]  # sums of the norms of the gradients, uncut and of each part
    eps: float  # rounding of the narrowest type that was met
    attributes: dict[str, dict[str, Tensor] | None]
    """By name of each attribute that is changed: losses that come with its new value; None: the
    forward pass fails with it."""


@contextmanager
def probing(update: Update) -> Iterator[None]:
    """Make passes that nobody sees afterwards, in full precision and without compilation."""
    precisions = [op.fp32_precision for op in _OPERATIONS]
    for op in _OPERATIONS:
        op.fp32_precision = "ieee"
    hooks = [h for m in update.model.modules() for h in (*m._forward_hooks.values(),)]
    try:
        with (
            use_torch_kernels(),  # rounding is then the same where shapes are
            preserve_generators(update.device),
            contents_kept([update.objective.example_losses, *hooks]),
            disable_compile(),
            update.outside_gradients_kept(),
        ):
            yield
    finally:
        for op, precision in zip(_OPERATIONS, precisions, strict=True):
            op.fp32_precision = precision


@contextmanager
def live_state_kept(update: Update) -> Iterator[None]:
    """Put back buffers and attributes of the model itself."""
    attributes, buffers = Attributes(update.model), Buffers(update.survey.buffers)
    try:
        yield
    finally:
        attributes.restore()
        buffers.restore()


@contextmanager
def live_subject(update: Update) -> Iterator[Subject]:
    """Try the model itself, and put back what the passes have changed in it."""
    live = update.survey.parameters
    subject = Subject(update.model, {name: p.detach().clone() for name, p in live.items()})
    try:
        with live_state_kept(update):
            yield subject
    finally:
        subject.put_back(live)


def twin_of(update: Update) -> nn.Module:
    """Copy the model; after the first check without its weights, which are the larger part."""
    model = unwrap(update.model)
    memo: dict[int, Any] = {}
    if update.facts.num_cut > 1:
        memo = {
            id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad)
            for name, p in model.named_parameters()
            if type(p) is nn.Parameter and name not in update.facts.written
        }
    twin: nn.Module = copy.deepcopy(model, memo)
    return twin


def trial_of(update: Update, subject: Subject) -> Trial:
    """Try a few examples cut in two, and uncut."""
    update, attributes, buffers = _prepare(update, subject)

    def restore() -> None:
        attributes.restore()
        buffers.restore()
        subject.put_back(update.survey.parameters)

    update, sums, cut, reduced = _run_cut(update, restore)
    restore()
    look = ForwardProbe(update.device)
    uncut = _run_uncut(update, buffers, reduced, sums, look)
    return Trial(
        num_examples=update.place.total,
        is_in_grains=update.find_grain_reason() is not None,
        uncut=uncut,
        cut=cut,
        differences=sums.sums,
        scales=sums.norms,
        eps=look.eps,
        attributes=_try_attributes(update, attributes, buffers, subject, uncut.values),
    )


def attributes_of(update: Update, subject: Subject) -> Trial:
    """Try a few examples uncut, for the attributes that a forward pass changes alone."""
    update, attributes, buffers = _prepare(update, subject)
    look = ForwardProbe(update.device)
    losses = _losses(update, buffers, look)
    values = {name: term.values.detach() for name, term in losses.items()}
    del losses
    outcome = Outcome(values, {}, {})
    changed = _try_attributes(update, attributes, buffers, subject, values)
    in_grains = update.find_grain_reason() is not None
    return Trial(len(values), in_grains, outcome, outcome, {}, {}, look.eps, changed)


def _prepare(update: Update, subject: Subject) -> tuple[Update, Attributes, Buffers]:
    survey, facts = survey_model(subject.model), replace(update.facts)
    if facts.outside:
        survey = add_outside_modules(survey, facts)
    update = replace(
        update,
        model=subject.model,
        survey=survey,
        facts=facts,
        hooks=hooks_of(survey.parameters),
        writes=Writes({}, None),
    )
    return update, Attributes(subject.model), Buffers(survey.buffers)


class _PartNorms(Accumulator):
    """Sums of gradients, and of the norms of the parts' gradients."""

    def clear(self) -> None:
        super().clear()
        self.norms = dict.fromkeys(self._parameters, 0.0)

    def add(self, part: MicroBatch) -> None:
        held = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        for name, gradient in held.items():
            wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            self.norms[name] += abs(self._scale) * float(torch.linalg.vector_norm(wide))
        super().add(part)


def _run_cut(
    update: Update, restore: Any
) -> tuple[Update, _PartNorms, Outcome, Mapping[str, Reduced]]:
    """Run the machinery over the examples, in two parts; returns the update as it was run."""
    share, is_reduced = update.share, False
    while True:
        update = replace(update, share=copy_of(share))
        sums = _PartNorms(update.survey.parameters, is_apart=True)
        own = Buffers(update.survey.buffers)
        try:
            versions = _versions(update)
            outcome = run(update, partial(_parts, update), own, sums)
            own.commit(None)
            break
        except (Drew, NeedsGraph) as again:
            if isinstance(again, Drew) and update.key is None:
                raise
            update.facts.draws = update.facts.draws or isinstance(again, Drew)
            update.facts.needs_graph |= isinstance(again, NeedsGraph)
        except LossError:
            raise
        except Exception:  # perhaps the reduction, which need not take few examples
            if is_reduced:
                raise
            objective = update.objective
            sum_of_each = {name: Sum() for name in objective.reductions}
            single = Sum() if list(sum_of_each) == ["data"] else sum_of_each
            update, is_reduced = (
                replace(update, objective=replace(objective, reduction=single)),
                True,
            )
        restore()
    sums.norms = {name: abs(outcome.factor) * norm for name, norm in sums.norms.items()}
    values = {name: term.values.detach() for name, term in outcome.losses.items()}
    left = _outcome(update, values, versions)
    return replace(update, share=share), sums, left, outcome.reduced


def _run_uncut(
    update: Update,
    buffers: Buffers,
    reduced: Mapping[str, Reduced],
    sums: "_PartNorms",
    look: ForwardProbe,
) -> Outcome:
    """Take the gradient by plain autograd, and subtract it from the sums as it arrives.

    Both go back with the coefficients of the cut examples: those of a maximum or of a contrastive
    loss may amplify the rounding of the losses a thousand times.
    """
    versions = _versions(update)
    losses = _losses(update, buffers, look)
    values = {name: term.values.detach() for name, term in losses.items()}
    outcome = _outcome(update, values, versions)
    pairs = [(t.values, reduced[name].coefficients) for name, t in losses.items()]
    pairs = [(v, c.to(v)) for v, c in pairs if v.requires_grad]
    parameters = list(update.survey.parameters.items())

    @torch.no_grad()
    def arrive(i: int) -> None:
        name, p = parameters[i]
        assert p.grad is not None
        gradient, p.grad = p.grad.to(sums.sums[name].dtype), None
        sums.norms[name] += float(torch.linalg.vector_norm(gradient))
        sums.sums[name].sub_(gradient)

    for _, p in parameters:
        p.grad = None
    aside = nullcontext() if update.hooks is None else update.hooks.set_aside()
    with aside, watch_gradients([p for _, p in parameters], arrive):
        if pairs:
            v, c = zip(*pairs, strict=True)
            run_backward(v, c, False, False, (), True, True)
    return outcome


def _losses(update: Update, buffers: Buffers, look: Any) -> Losses:
    """Make the forward pass over all examples in one graph; grain by grain where it must be."""
    parts = [MicroBatch(0, update.place.total)]
    if update.find_grain_reason() is not None:
        parts = _parts(update)
    pieces = []
    for part in parts:
        buffers.restore()
        if len(parts) > 1:
            buffers.replace()  # the graph of one grain holds what the next one changes
        if update.key is not None and part.grain is not None:
            seed_generators(update.key.grain(part.grain), update.device)
        piece = copy_of(pytree.take_examples(update.share, part.start, part.stop))
        piece = copy_of(pytree.prepare_batch(piece, update.device))
        with torch.enable_grad(), look, autocast(update.precision, update.device):
            returned = update.objective.call(update.model, piece)
        pieces.append(update.objective.check(returned, part.stop - part.start))
    return concatenate_losses(pieces)


def _parts(update: Update) -> list[MicroBatch]:
    """Cut the examples in two; into grains of half of them, at most, where the model needs it."""
    size, why = update.place.total, update.find_grain_reason()
    if why is None:
        # A single example would fail where examples are coupled, in place of showing it; and
        # they may come in pairs.
        first = min(2, size // 2)
        return [MicroBatch(0, first), MicroBatch(first, size)]
    grain = min(update.objective.grain or size, max(2, size // 2))
    return cut_grains(update.place, grain, Layout(), why)


def _try_attributes(
    update: Update,
    attributes: Attributes,
    buffers: Buffers,
    subject: Subject,
    values: dict[str, Tensor],
) -> dict[str, dict[str, Tensor] | None]:
    """Make the forward pass again with each attribute that the first one has changed."""

    def values_with(change: Change) -> dict[str, Tensor] | None:
        attributes.restore()
        buffers.restore()
        subject.put_back(update.survey.parameters)
        change.apply()
        try:
            losses = _losses(update, buffers, nullcontext())
        except Exception:
            return None
        return {name: term.values.detach() for name, term in losses.items()}

    found = {}
    for name, change in attributes.changed().items():
        found[name] = values_with(change)
        for far in attributes.far(change):
            other = values_with(far)
            if other is None or any(not torch.equal(v, values[n]) for n, v in other.items()):
                found[name] = other
    attributes.restore()
    return found


def _versions(update: Update) -> dict[str, int]:
    return {name: p._version for name, p in update.survey.parameters.items()}


@torch.no_grad()
def _outcome(update: Update, values: dict[str, Tensor], versions: Mapping[str, int]) -> Outcome:
    """Note what passes have left."""
    names = {id(m): name for name, m in update.model.named_modules()}
    buffers = {
        f"{names.get(id(module), type(module).__name__)}.{name}".lstrip("."): now.detach().clone()
        for module, name, _ in update.survey.buffers
        if name in module._buffers and (now := module._buffers[name]) is not None
    }
    changed = {
        name: p.detach().clone()
        for name, p in update.survey.parameters.items()
        if p._version != versions[name]
    }
    grainwise = update.find_grain_reason() is not None
    return Outcome(values, {} if grainwise else buffers, changed)
