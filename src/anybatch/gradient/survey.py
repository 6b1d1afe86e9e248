"""Survey of a model: its trainable parameters, its buffers, and what ties its examples together.

A model that *draws* random numbers or *couples* examples runs one grain at a time. Layers of torch
that do so are recognised. Draws anywhere else are detected: the states of the generators are
compared after a pass. Those of NumPy and `random` take longer to compare; this stops once an
update in the model's present mode has left them alone, so a model that begins to draw from them
later is not detected. Neither is coupling outside of torch's layers; `self_check` looks for it.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from types import FunctionType, MethodType
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from anybatch._torch import BATCH_NORMS, DROPOUTS
from anybatch.compiled import WRAPPED, unwrap
from anybatch.distributed import fsdp
from anybatch.errors import ModelError
from anybatch.gradient.closures import find_modules, list_closure
from anybatch.model_facts import find_record

__all__ = [
    "Facts",
    "NewFact",
    "Survey",
    "add_outside_modules",
    "check_parameter",
    "find_grain_reason",
    "get_facts",
    "separate_elements",
    "survey_model",
    "survey_update",
]

Mode = tuple[bool, ...]

COUPLES = "couples examples"
"""End of the sentence on a layer whose examples depend on each other."""

DRAWS = "the model draws random numbers"
"""Reason to run grain by grain if a layer that is not recognised draws."""


@dataclass(slots=True)
class Facts:
    """Facts that updates have shown about a model, under one `example_losses` and in one mode."""

    draws: bool | None = None  # whether it draws random numbers; None: no update has shown it yet
    needs_graph: bool = False  # whether its losses contain derivatives
    changes_batch: bool = False  # whether a forward pass has written into its batch
    comes_in_portions: bool = False  # whether a gradient continued to arrive after it was sent
    is_graph_checked: bool = False  # whether the leaves of its graph have been checked
    num_cut: int = 0  # updates so far in which the batch was cut
    num_uncut: int = 0  # other updates so far
    changed_parameters: frozenset[str] = frozenset()  # a forward pass changes them, and it is exact
    outside: dict[str, ReferenceType[nn.Module]] = field(default_factory=dict)
    """Modules besides the model that `example_losses` uses, such as a critic or a teacher."""

    def list_outside(self) -> list[nn.Module]:
        """List the outside modules that still exist."""
        return [module for reference in self.outside.values() if (module := reference())]


class NewFact(Exception):
    """Signals that an update has shown a new fact, and must be computed again.

    Nothing has been committed when it is raised. The next attempt takes account of the fact.

    Args:
        name: field of `Facts` that becomes True.
    """

    @property
    def name(self) -> str:
        """Name of the field of `Facts`."""
        return str(self.args[0])


class _Records(dict[Hashable, Facts]):
    """Facts about one model, by its mode and `example_losses`."""


class Survey(NamedTuple):
    """Result of one walk over a model."""

    parameters: dict[str, nn.Parameter]  # the trainable ones, by name
    buffers: list[tuple[nn.Module, str, Tensor]]  # with the module and name that hold them
    mode: Mode
    layer: str | None  # first layer that draws or couples, in a sentence
    units: list[nn.Module]  # modules that fully_shard was called on
    frozen: list[nn.Parameter]  # parameters that are not trainable
    hooked: dict[str, nn.Parameter]  # trainable parameters with hooks of the user


def survey_model(model: nn.Module) -> Survey:
    """Walk over a model. This takes a few microseconds, since every update does it.

    Raises:
        ModelError: a model that averages over ranks by itself, or has nothing to train.
    """
    is_compiled = WRAPPED in model._modules
    survey = _walk([("", unwrap(model) if is_compiled else model)])
    if not survey.parameters:
        raise ModelError(
            "The model has no trainable parameters. Pass a model with at least one parameter whose "
            "requires_grad is True."
        )
    return survey


def survey_update(model: nn.Module, example_losses: Callable[..., Any]) -> tuple[Survey, Facts]:
    """Survey a model and the modules outside of it that an `example_losses` uses.

    Returns:
        The survey, and what is known about the model under this `example_losses`.
    """
    survey = survey_model(model)
    facts = get_facts(model, example_losses, survey.mode)
    return (add_outside_modules(survey, facts) if facts.outside else survey), facts


def get_facts(model: nn.Module, example_losses: Callable[..., Any], mode: Mode) -> Facts:
    """Return what is known about a model under one `example_losses`, in one mode."""
    key = (mode, *_identify(example_losses))
    records = find_record(model, _Records)
    facts = records.get(key)
    if facts is None:
        for name, p in unwrap(model).named_parameters():
            check_parameter(name, p, trains=p.requires_grad)
        modules = find_modules(example_losses, model)
        facts = Facts(outside={name: ref(module) for name, module in modules.items()})
        records[key] = facts
    return facts


def add_outside_modules(survey: Survey, facts: Facts) -> Survey:
    """Add the buffers and layers of the modules outside of the model to its survey."""
    names = [(f"{name}.", module()) for name, module in facts.outside.items()]
    outside = _walk([(name, module) for name, module in names if module is not None])
    modules = {id(module) for module, _, _ in survey.buffers}
    buffers = [buffer for buffer in outside.buffers if id(buffer[0]) not in modules]
    return survey._replace(buffers=[*survey.buffers, *buffers], layer=survey.layer or outside.layer)


def _identify(function: Any) -> tuple[Hashable, ...]:
    """Identify a function; one that is defined anew around the same functions is the same.

    Other contents, such as numbers and tensors, do not count: a loop may change them at each step.
    """
    if isinstance(function, partial):
        contents = [*function.args, *function.keywords.values()]
        identity = _identify(function.func)
    elif isinstance(function, MethodType):
        return (*_identify(function.__func__), id(function.__self__))
    elif isinstance(function, FunctionType):
        contents = list_closure(function) if function.__closure__ else []
        contents += function.__defaults__ or ()
        identity = (function.__code__,)
    else:
        return (id(type(function)), id(function))
    for value in contents:
        if callable(value):
            identity += (id(value),)
    return identity


def _walk(waiting: list[tuple[str, nn.Module]]) -> Survey:
    """Walk over modules, as `named_modules` does, but without the cost of its generators."""
    parameters: dict[str, nn.Parameter] = {}
    hooked: dict[str, nn.Parameter] = {}
    frozen: list[nn.Parameter] = []
    buffers: list[tuple[nn.Module, str, Tensor]] = []
    mode: list[bool] = []
    units: list[nn.Module] = []
    layer, visited, visited_parameters = None, set(), set()  # ids of these: their hash is slow
    while waiting:
        prefix, module = waiting.pop()
        if module in visited:
            continue
        visited.add(module)
        mode.append(module.training)
        for name, p in module._parameters.items():
            if p is None or id(p) in visited_parameters:
                continue
            visited_parameters.add(id(p))
            if not p.requires_grad:
                frozen.append(p)
                continue
            parameters[prefix + name] = p
            if p._backward_hooks or p._post_accumulate_grad_hooks:
                hooked[prefix + name] = p
        if module._buffers:
            separate_elements(module)
            buffers += [(module, n, b) for n, b in module._buffers.items() if b is not None]
        if fsdp.is_fsdp_type(module.__class__):  # type: ignore[arg-type]
            units.append(module)
        if _has_rule(module.__class__):  # type: ignore[arg-type]
            rule = _apply_rule(module)
            if rule and layer is None:
                layer = f"the {type(module).__name__} {prefix[:-1]!r} {rule}"
        if module._modules:
            children = [(f"{prefix}{n}.", m) for n, m in module._modules.items() if m is not None]
            waiting += children[::-1]
    return Survey(parameters, buffers, tuple(mode), layer, units, frozen, hooked)


def find_grain_reason(model: nn.Module, example_losses: Callable[..., Any]) -> str | None:
    """Return why a model must run grain by grain under an `example_losses`; None: it need not."""
    survey, facts = survey_update(model, example_losses)
    return survey.layer or (DRAWS if facts.draws else None)


@lru_cache(maxsize=1024)
def _has_rule(kind: Any) -> bool:
    """Return whether `_apply_rule` knows modules of this class."""
    kinds = (
        BATCH_NORMS,
        DROPOUTS,
        nn.RNNBase,
        nn.MultiheadAttention,
        nn.DataParallel,
        nn.parallel.DistributedDataParallel,
    )
    return issubclass(kind, kinds)


def _apply_rule(module: nn.Module) -> str | None:
    """Return whether a layer draws or couples, as the end of a sentence; None: neither."""
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise ModelError(
            "The model is wrapped in DistributedDataParallel or DataParallel, which would average "
            "gradients a second time. Pass the bare model, model.module, and group=... for the "
            "ranks."
        )
    if isinstance(module, nn.SyncBatchNorm) and module.training:
        raise ModelError(
            "SyncBatchNorm couples the examples that all ranks hold at the same time, so its "
            "statistics depend on the layout. Use BatchNorm: its statistics are those of a grain, "
            "in every layout."
        )
    if isinstance(module, BATCH_NORMS):
        return COUPLES if module.training or module.running_mean is None else None
    dropout = getattr(module, "p" if isinstance(module, DROPOUTS) else "dropout", 0)
    return "draws random numbers" if module.training and dropout > 0 else None


def separate_elements(module: nn.Module) -> None:
    """Copy expanded buffers, whose elements share memory: torch could not write into them."""
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.layout == torch.strided and 0 in buffer.stride():
            module._buffers[name] = buffer.contiguous()


def check_parameter(name: str, parameter: Tensor, *, trains: bool = True) -> None:
    """Refuse a parameter without a shape, without values, or closed to autograd.

    Args:
        trains: whether autograd is to reach it.

    Raises:
        ModelError: a lazy parameter, one on the meta device, or one made in inference mode.
    """
    if is_lazy(parameter):
        raise ModelError(
            f"{name} has no shape yet, since its layer is lazy. Call the model on a few examples "
            f"first, under torch.no_grad(), and make the optimiser afterwards."
        )
    if parameter.is_meta:
        raise ModelError(
            f"{name} is on the meta device, which holds no values. Call "
            f"model.to_empty(device=...) and load its weights, or build the model elsewhere."
        )
    if trains and parameter.is_inference():
        raise ModelError(
            f"{name} was made under torch.inference_mode(), so autograd cannot train it. Build or "
            f"load the model outside of it, or train copy.deepcopy(model)."
        )
