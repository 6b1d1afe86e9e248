"""Passes over a few examples, cut and uncut, for `self_check`. They restore everything."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.compiled import unwrap
from anybatch.errors import LossError
from anybatch.example_losses import Losses, concatenate_losses
from anybatch.gradient.attributes import Attribute, Attributes
from anybatch.gradient.buckets import watch_gradients
from anybatch.gradient.buffers import Buffers
from anybatch.gradient.closures import preserve_contents
from anybatch.gradient.data_term import sum_data_term
from anybatch.gradient.parameter_hooks import ParameterHooks
from anybatch.gradient.passes import Accumulator, run_engine
from anybatch.gradient.survey import NewFact, add_outside_modules, survey_model
from anybatch.gradient.update import Update, Writes
from anybatch.kernels.choice import use_torch_kernels
from anybatch.layout import Layout, MicroBatch, cut_grains
from anybatch.ledger.trial_run import ForwardProbe, disable_compile
from anybatch.precision import autocast
from anybatch.pytree import copy_batch, prepare_batch, take_examples
from anybatch.randomness import preserve_generators, seed_generators
from anybatch.reduction import Reduced, Sum

__all__ = [
    "Subject",
    "Trial",
    "copy_model",
    "preserve_everything",
    "preserve_state",
    "try_attributes",
    "try_layouts",
    "use_live_model",
]

# These objects are created on import, where a type checker does not see them. The older switches
# (`set_float32_matmul_precision`, `allow_tf32`) raise once somebody has used these.
_backends: Any = torch.backends
_OPERATIONS = [
    *(_backends.mkldnn.matmul, _backends.mkldnn.conv, _backends.mkldnn.rnn),
    *(_backends.cuda.matmul, _backends.cudnn.conv, _backends.cudnn.rnn),
]
"""Operations that may compute float32 in a narrower type."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to try, and the original values of its parameters."""

    model: nn.Module
    originals: Mapping[str, Tensor]

    @torch.no_grad()
    def restore(self, parameters: Mapping[str, Tensor]) -> None:
        """Restore parameters that a pass has changed."""
        for name, p in parameters.items():
            if not torch.equal(p, self.originals[name]):
                p.copy_(self.originals[name])


@dataclass(slots=True)
class Effects:
    """Losses of a few examples, and the values of what the passes have changed."""

    values: dict[str, Tensor]
    buffers: dict[str, Tensor]
    parameters: dict[str, Tensor]


@dataclass(slots=True)
class Trial:
    """Results for a few examples, uncut and cut."""

    num_examples: int
    is_in_grains: bool
    uncut: Effects
    cut: Effects
    differences: dict[str, Tensor]  # of the gradients, by parameter
    scales: dict[str, float]  # sums of the norms of the gradients, uncut and per micro-batch
    eps: float  # rounding of the narrowest type in use
    attributes: dict[str, dict[str, Tensor] | None]
    """By name of each changed attribute: losses with its new value; None: the forward pass fails
    with it."""


@contextmanager
def preserve_everything(update: Update) -> Iterator[None]:
    """Run passes that leave no trace, in full precision and without compilation."""
    precisions = [op.fp32_precision for op in _OPERATIONS]
    for op in _OPERATIONS:
        op.fp32_precision = "ieee"
    hooks = [h for m in update.model.modules() for h in (*m._forward_hooks.values(),)]
    try:
        with (
            use_torch_kernels(),  # equal shapes then have equal rounding
            preserve_generators(update.device),
            preserve_contents([update.objective.example_losses, *hooks]),
            disable_compile(),
            update.preserve_outside_gradients(),
        ):
            yield
    finally:
        for op, precision in zip(_OPERATIONS, precisions, strict=True):
            op.fp32_precision = precision


@contextmanager
def preserve_state(update: Update) -> Iterator[None]:
    """Restore buffers and attributes of the model itself at the end of a block."""
    attributes, buffers = Attributes(update.model), Buffers(update.survey.buffers)
    try:
        yield
    finally:
        attributes.restore()
        buffers.restore()


@contextmanager
def use_live_model(update: Update) -> Iterator[Subject]:
    """Try the model itself, and restore what the passes have changed in it."""
    live = update.survey.parameters
    subject = Subject(update.model, {name: p.detach().clone() for name, p in live.items()})
    try:
        with preserve_state(update):
            yield subject
    finally:
        subject.restore(live)


def copy_model(update: Update) -> nn.Module:
    """Copy the model; after the first check without its weights, which are the larger part."""
    model = unwrap(update.model)
    memo: dict[int, Any] = {}
    if update.facts.num_cut > 1:
        memo = {
            id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad)
            for name, p in model.named_parameters()
            if type(p) is nn.Parameter and name not in update.facts.changed_parameters
        }
    twin: nn.Module = copy.deepcopy(model, memo)
    return twin


def try_layouts(update: Update, subject: Subject) -> Trial:
    """Try a few examples cut in two, and uncut."""
    update, attributes, buffers = _prepare(update, subject)

    def restore() -> None:
        attributes.restore()
        buffers.restore()
        subject.restore(update.survey.parameters)

    update, sums, cut, reduced = _run_cut(update, restore)
    restore()
    look = ForwardProbe(update.device)
    uncut = _run_uncut(update, buffers, reduced, sums, look)
    return Trial(
        num_examples=update.share_range.total,
        is_in_grains=update.find_grain_reason() is not None,
        uncut=uncut,
        cut=cut,
        differences=sums.sums,
        scales=sums.norms,
        eps=look.eps,
        attributes=_try_changes(update, attributes, buffers, subject, uncut.values),
    )


def try_attributes(update: Update, subject: Subject) -> Trial:
    """Try a few examples uncut, only for the attributes that a forward pass changes."""
    update, attributes, buffers = _prepare(update, subject)
    look = ForwardProbe(update.device)
    losses = _compute_losses(update, buffers, look)
    values = {name: term.values.detach() for name, term in losses.items()}
    del losses
    effects = Effects(values, {}, {})
    changes = _try_changes(update, attributes, buffers, subject, values)
    is_in_grains = update.find_grain_reason() is not None
    return Trial(len(values), is_in_grains, effects, effects, {}, {}, look.eps, changes)


def _prepare(update: Update, subject: Subject) -> tuple[Update, Attributes, Buffers]:
    survey, facts = survey_model(subject.model), replace(update.facts)
    if facts.outside:
        survey = add_outside_modules(survey, facts)
    update = replace(
        update,
        model=subject.model,
        survey=survey,
        facts=facts,
        hooks=ParameterHooks(survey.hooked) if survey.hooked else None,
        writes=Writes({}, None),
    )
    return update, Attributes(subject.model), Buffers(survey.buffers)


class _NormAccumulator(Accumulator):
    """Sums of gradients, and of the norms of the micro-batches' gradients."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameters, is_separate=True)
        self.norms = dict.fromkeys(parameters, 0.0)

    def add(self, micro_batch: MicroBatch) -> None:
        for name, p in self._parameters.items():
            if p.grad is not None:
                wide = p.grad.to(torch.promote_types(p.grad.dtype, torch.float32))
                self.norms[name] += abs(self._scale) * float(torch.linalg.vector_norm(wide))
        super().add(micro_batch)


def _run_cut(
    update: Update, restore: Any
) -> tuple[Update, _NormAccumulator, Effects, Mapping[str, Reduced]]:
    """Run the machinery over the examples, cut in two; return the update as it was run."""
    share, sums_examples = update.share, False
    while True:
        update = replace(update, share=copy_batch(share))
        sums = _NormAccumulator(update.survey.parameters)
        buffers = Buffers(update.survey.buffers)
        try:
            versions = _read_versions(update)
            outcome = sum_data_term(update, partial(_cut_in_two, update), buffers, sums)
            buffers.commit(None)
            break
        except NewFact as fact:
            if fact.name == "draws" and update.key is None:
                raise
            setattr(update.facts, fact.name, True)
        except LossError:
            raise
        except Exception:  # perhaps the reduction, which need not support few examples
            if sums_examples:
                raise
            terms = {name: Sum() for name in update.objective.reductions}
            reduction = Sum() if list(terms) == ["data"] else terms
            update = replace(update, objective=replace(update.objective, reduction=reduction))
            sums_examples = True
        restore()
    sums.norms = {name: abs(outcome.factor) * norm for name, norm in sums.norms.items()}
    values = {name: term.values.detach() for name, term in outcome.losses.items()}
    effects = _read_effects(update, values, versions)
    return replace(update, share=share), sums, effects, outcome.reduced


def _run_uncut(
    update: Update,
    buffers: Buffers,
    reduced: Mapping[str, Reduced],
    sums: _NormAccumulator,
    look: ForwardProbe,
) -> Effects:
    """Compute the gradient by plain autograd, and subtract it from the sums as it arrives.

    Both passes use the coefficients of the cut examples: those of a maximum or of a contrastive
    loss may amplify the rounding of the losses a thousand times.
    """
    versions = _read_versions(update)
    losses = _compute_losses(update, buffers, look)
    values = {name: term.values.detach() for name, term in losses.items()}
    effects = _read_effects(update, values, versions)
    parameters = list(update.survey.parameters.items())

    @torch.no_grad()
    def subtract(i: int) -> None:
        name, p = parameters[i]
        assert p.grad is not None
        gradient, p.grad = p.grad.to(sums.sums[name].dtype), None
        sums.norms[name] += float(torch.linalg.vector_norm(gradient))
        sums.sums[name].sub_(gradient)

    for _, p in parameters:
        p.grad = None
    no_hooks = nullcontext() if update.hooks is None else update.hooks.disable()
    with no_hooks, watch_gradients([p for _, p in parameters], subtract):
        run_engine(losses, {name: result.coefficients for name, result in reduced.items()})
    return effects


def _compute_losses(
    update: Update, buffers: Buffers, context: AbstractContextManager[object]
) -> Losses:
    """Run the forward pass over all examples in one graph, grain by grain if necessary."""
    micro_batches = [MicroBatch(0, update.share_range.total)]
    if update.find_grain_reason() is not None:
        micro_batches = _cut_in_two(update)
    pieces = []
    for micro_batch in micro_batches:
        buffers.restore()
        if len(micro_batches) > 1:
            buffers.replace()  # the graph of one grain needs what the next grain changes
        if update.key is not None and micro_batch.grain is not None:
            seed_generators(update.key.grain(micro_batch.grain), update.device)
        batch = copy_batch(take_examples(update.share, micro_batch.start, micro_batch.stop))
        batch = copy_batch(prepare_batch(batch, update.device))
        with torch.enable_grad(), context, autocast(update.precision, update.device):
            returned = update.objective.call(update.model, batch)
        pieces.append(update.objective.check(returned, micro_batch.size))
    return concatenate_losses(pieces)


def _cut_in_two(update: Update) -> list[MicroBatch]:
    """Cut the examples in two, or into grains of at most half of them if the model needs grains."""
    size, reason = update.share_range.total, update.find_grain_reason()
    if reason is None:
        # A single example could fail if examples are coupled, and hide the coupling. Examples may
        # also come in pairs.
        first = min(2, size // 2)
        return [MicroBatch(0, first), MicroBatch(first, size)]
    grain = min(update.objective.grain or size, max(2, size // 2))
    return cut_grains(update.share_range, grain, Layout(), reason)


def _try_changes(
    update: Update,
    attributes: Attributes,
    buffers: Buffers,
    subject: Subject,
    values: dict[str, Tensor],
) -> dict[str, dict[str, Tensor] | None]:
    """Repeat the forward pass with each attribute that the first one has changed."""

    def compute_values(change: Attribute) -> dict[str, Tensor] | None:
        attributes.restore()
        buffers.restore()
        subject.restore(update.survey.parameters)
        change.restore()
        try:
            losses = _compute_losses(update, buffers, nullcontext())
        except Exception:
            return None
        return {name: term.values.detach() for name, term in losses.items()}

    results = {}
    for name, change in attributes.find_changes().items():
        results[name] = compute_values(change)
        for later in attributes.extrapolate(change):
            other = compute_values(later)
            if other is None or any(not torch.equal(v, values[n]) for n, v in other.items()):
                results[name] = other
    attributes.restore()
    return results


def _read_versions(update: Update) -> dict[str, int]:
    return {name: p._version for name, p in update.survey.parameters.items()}


@torch.no_grad()
def _read_effects(
    update: Update, values: dict[str, Tensor], versions: Mapping[str, int]
) -> Effects:
    """Read the buffers and parameters that passes have changed."""
    names = {id(m): name for name, m in update.model.named_modules()}
    buffers = {
        f"{names.get(id(module), type(module).__name__)}.{name}".lstrip("."): now.detach().clone()
        for module, name, _ in update.survey.buffers
        if name in module._buffers and (now := module._buffers[name]) is not None
    }
    parameters = {
        name: p.detach().clone()
        for name, p in update.survey.parameters.items()
        if p._version != versions[name]
    }
    is_in_grains = update.find_grain_reason() is not None
    return Effects(values, {} if is_in_grains else buffers, parameters)
