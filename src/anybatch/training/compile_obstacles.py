"""Find out why updates cannot be compiled, before any is made."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from anybatch._torch import list_global_step_hooks
from anybatch.gradient import ClipExamples
from anybatch.gradient.survey import DRAWS, survey_update
from anybatch.layout import Layout
from anybatch.objective import Objective
from anybatch.optim.closures import needs_closure

__all__ = ["find_model_obstacle", "find_obstacle"]

_FLAGS = ("foreach", "fused", "differentiable", "capturable")  # of torch's optimisers


def find_obstacle(
    model: nn.Module, objective: Objective, optimizer: Any, options: Mapping[str, Any]
) -> str | None:
    """Find why the updates of a training cannot be compiled; None: nothing speaks against it.

    Args:
        options: further arguments of `steps`.
    """
    if isinstance(options["clip"], ClipExamples):
        return "clip=ClipExamples needs the gradient of each example"
    for name, needs in (("group", "several ranks exchange gradients"), ("observe", "it watches")):
        if options[name] is not None:
            return f"{name}= is set, and {needs} in the middle of an update"
    if options["spikes"] is not None:
        return "spikes= is set, and a spike is computed again at the weights before the update"
    if options["precision"] != "float32":
        return f"precision is {options['precision']!r}; only 'float32' is compiled"
    layout: Layout | None = options["layout"]
    if layout is not None and layout.micro_batch is not None:
        return "the layout cuts batches into micro-batches; only a whole batch is compiled"
    return _find_optimizer_obstacle(optimizer) or find_model_obstacle(model, objective)


def _find_optimizer_obstacle(optimizer: Any) -> str | None:
    kind = type(optimizer).__name__
    if not (isinstance(optimizer, Optimizer) and type(optimizer).__module__.startswith("torch.")):
        return f"{kind} is not one of torch's optimisers"
    if needs_closure(optimizer):
        return f"{kind} evaluates the loss itself"
    flags = [name for group in optimizer.param_groups for name in _FLAGS if group.get(name)]
    if flags:
        return f"{kind} was made with {flags[0]}=True; leave it out"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return f"{kind} has hooks on its step"
    if list_global_step_hooks():
        return "the steps of all optimisers have hooks"
    if "step" in vars(optimizer) and not hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        return f"the method step of this {kind} was replaced"
    return None


def find_model_obstacle(model: nn.Module, objective: Objective) -> str | None:
    """Find why a model, as it is now, cannot be compiled under an objective."""
    for name, reduction in objective.reductions.items():
        if reduction.factor(1.0, 1) is None:
            return f"the reduction {reduction} of the term {name!r} is not linear, as Mean is"
    survey, facts = survey_update(model, objective.example_losses)
    if survey.layer is not None:
        return survey.layer
    if facts.draws:
        return DRAWS
    if survey.units:
        return "fully_shard has sharded the model"
    if facts.outside:
        return f"example_losses uses modules besides the model: {', '.join(facts.outside)}"
    if survey.hooked:
        return f"the parameter {next(iter(survey.hooked))} has a hook"
    for name, p in survey.parameters.items():
        if p.device.type != "cpu":
            return f"{name} is on {p.device}; only updates on the CPU are compiled"
        if p.is_complex() or p.itemsize < 4:
            return f"{name} is {p.dtype}; only float32 and float64 are compiled"
    return None
