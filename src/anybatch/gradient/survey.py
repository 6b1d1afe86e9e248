"""What a model does that ties the examples of a micro-batch together.

A model that *draws* random numbers or *couples* examples runs one grain at a time. Layers of
torch that do so are known beforehand; draws anywhere else show when the states of the
generators are compared after a pass. NumPy's and `random`'s, which take longer to compare, are
watched until an update in the model's present mode has left them alone; what begins to draw
from them only later is not seen. Nor is a coupling outside of torch's layers.
"""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from types import FunctionType, MethodType
from typing import Any, NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from anybatch._torch import BATCH_NORMS, DROPOUTS
from anybatch.compiled import unwrap
from anybatch.distributed import fsdp
from anybatch.errors import ModelError
from anybatch.gradient.closures import closure_of, modules_used_by
from anybatch.gradient.materialized import check_materialized

__all__ = [
    "Facts",
    "Survey",
    "add_outside_modules",
    "find_grain_reason",
    "get_facts",
    "grain_reason",
    "separate_elements",
    "survey_model",
]

Mode = tuple[bool, ...]


@dataclass(slots=True)
class Facts:
    """Facts that updates have shown of a model, under one `example_losses` and in one mode."""

    draws: bool | None = None  # whether it draws random numbers; None: no update has shown it yet
    needs_graph: bool = False  # whether its losses contain derivatives
    comes_in_portions: bool = False  # whether a gradient went on after it was sent
    is_graph_known: bool = False  # whether the leaves of its graph have been looked at
    num_cut: int = 0  # updates so far in which the batch was cut
    num_whole: int = 0  # and others
    written: frozenset[str] = frozenset()  # parameters that a forward pass changes, which is exact
    outside: dict[str, ReferenceType[nn.Module]] = field(default_factory=dict)
    """Modules besides the model that `example_losses` uses, such as a critic or a teacher."""


# By model, and for each by mode and `example_losses`.
_facts: WeakKeyDictionary[nn.Module, dict[Hashable, Facts]] = WeakKeyDictionary()


class Survey(NamedTuple):
    """What one walk over a model finds."""

    parameters: dict[str, nn.Parameter]  # the trainable ones, by name
    buffers: list[tuple[nn.Module, str, Tensor]]  # by the module and name that hold them
    mode: Mode
    layer: str | None  # the first that draws or couples, and which of these
    units: list[nn.Module]  # those that fully_shard was called on
    frozen: list[nn.Parameter]  # those that are not trainable


def survey_model(model: nn.Module) -> Survey:
    """Walk over a model; a few microseconds, as it is done at every update.

    Raises:
        ModelError: a model that averages over ranks by itself, or has nothing to train.
    """
    found = _walk([("", unwrap(model))])
    if not found.parameters:
        raise ModelError("expected a model with trainable parameters, got none.")
    return found


def get_facts(model: nn.Module, example_losses: Callable[..., Any], mode: Mode) -> Facts:
    """Look up what is known of a model under one `example_losses`, in one mode."""
    by_key, key = _facts.setdefault(model, {}), (mode, *_identity(example_losses))
    if key not in by_key:
        for name, p in unwrap(model).named_parameters():
            check_materialized(name, p, trains=p.requires_grad)
        outside = modules_used_by(example_losses, model)
        by_key[key] = Facts(outside={name: ref(module) for name, module in outside.items()})
    return by_key[key]


def add_outside_modules(survey: Survey, facts: Facts) -> Survey:
    """Add the buffers and habits of the modules outside of the model to its survey."""
    outside = [(f"{name}.", module()) for name, module in facts.outside.items()]
    found = _walk([(name, module) for name, module in outside if module is not None])
    own = {id(module) for module, _, _ in survey.buffers}
    buffers = [held for held in found.buffers if id(held[0]) not in own]
    return survey._replace(buffers=[*survey.buffers, *buffers], layer=survey.layer or found.layer)


def _identity(function: Any) -> tuple[Hashable, ...]:
    """Tell functions apart; one that is defined anew around the same functions is the same.

    Other contents, such as numbers and tensors, do not count: a loop may change them at each step.
    """
    if isinstance(function, partial):
        given = (*function.args, *function.keywords.values())
        return (*_identity(function.func), *_ids(given))
    if isinstance(function, MethodType):
        return (*_identity(function.__func__), id(function.__self__))
    if isinstance(function, FunctionType):
        return (function.__code__, *_ids(closure_of(function)), *_ids(function.__defaults__ or ()))
    return (id(type(function)), id(function))


def _ids(contents: Iterable[Any]) -> list[int]:
    return [id(one) for one in contents if callable(one)]


def _walk(todo: list[tuple[str, nn.Module]]) -> Survey:
    names: dict[nn.Parameter, str] = {}
    frozen: list[nn.Parameter] = []
    buffers: list[tuple[nn.Module, str, Tensor]] = []
    mode: list[bool] = []
    units: list[nn.Module] = []
    layer, seen = None, set()
    while todo:  # `named_modules`, its generators unrolled
        prefix, module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        mode.append(module.training)
        for name, p in module._parameters.items():
            if p is None or p in names:
                continue
            if p.requires_grad:
                names[p] = prefix + name
            else:
                frozen.append(p)
        separate_elements(module)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                buffers.append((module, name, buffer))
        if fsdp.is_fsdp_type(module.__class__):  # type: ignore[arg-type]
            units.append(module)
        if _is_known(module.__class__):  # type: ignore[arg-type]
            habit = _habit(module)
            if habit and layer is None:
                layer = f"the {type(module).__name__} {prefix[:-1]!r} {habit}"
        if module._modules:
            children = [(f"{prefix}{n}.", m) for n, m in module._modules.items() if m is not None]
            todo += children[::-1]
    parameters = {name: p for p, name in names.items()}
    return Survey(parameters, buffers, tuple(mode), layer, units, frozen)


def find_grain_reason(model: nn.Module, example_losses: Callable[..., Any]) -> str | None:
    """Tell why a model must run grain by grain under an `example_losses`; None: it need not."""
    found = survey_model(model)
    facts = get_facts(model, example_losses, found.mode)
    return grain_reason(add_outside_modules(found, facts), facts)


def grain_reason(survey: Survey, facts: Facts) -> str | None:
    """Tell why a model must run grain by grain, from what is known of it; None: it need not."""
    if survey.layer is not None:
        return survey.layer
    return "the model draws random numbers" if facts.draws else None


@lru_cache(maxsize=1024)
def _is_known(kind: Any) -> bool:
    """Whether `_habit` has a word on modules of this type."""
    known = (
        BATCH_NORMS,
        DROPOUTS,
        nn.RNNBase,
        nn.MultiheadAttention,
        nn.DataParallel,
        nn.parallel.DistributedDataParallel,
    )
    return issubclass(kind, known)


def separate_elements(module: nn.Module) -> None:
    """Give expanded buffers of a module, whose elements share memory, memory for each of them."""
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.layout == torch.strided and 0 in buffer.stride():
            module._buffers[name] = buffer.contiguous()  # torch could not write into it otherwise


def _habit(module: nn.Module) -> str | None:
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise ModelError(
            "expected the bare model, got one wrapped in DistributedDataParallel or DataParallel, "
            "which would average gradients a second time. Pass model.module, and group=... for "
            "the ranks."
        )
    if isinstance(module, nn.SyncBatchNorm) and module.training:
        raise ModelError(
            "SyncBatchNorm couples whatever the ranks hold at the moment, so its statistics depend "
            "on the layout. Use BatchNorm: its statistics are those of a grain, in every layout."
        )
    if isinstance(module, BATCH_NORMS):
        uses_batch = module.training or module.running_mean is None
        return "couples examples" if uses_batch else None
    if isinstance(module, DROPOUTS):
        return "draws random numbers" if module.training and module.p > 0 else None
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return "draws random numbers" if module.training and module.dropout > 0 else None
    return None
