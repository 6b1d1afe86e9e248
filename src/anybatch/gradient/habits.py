"""What a model does that ties the examples of a micro-batch together.

A model that *draws* random numbers or *couples* examples runs one grain at a time. Layers of
torch that do so are known beforehand; draws anywhere else show when the states of the
generators are compared after a pass. NumPy's and `random`'s, which take longer to compare, are
watched until an update in the model's present mode has left them alone; what begins to draw
from them only later is not seen. Nor is a coupling outside of torch's layers.
"""

from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from anybatch.distributed import shards
from anybatch.errors import ModelError

__all__ = ["Survey", "draws", "remember", "survey", "why_grains"]

Mode = tuple[bool, ...]

# What updates have shown of a model in each of its modes (train or eval, by module).
_seen: WeakKeyDictionary[nn.Module, dict[Mode, bool]] = WeakKeyDictionary()


class Survey(NamedTuple):
    """What one walk over a model finds."""

    parameters: dict[str, nn.Parameter]  # the trainable ones, by name
    buffers: list[tuple[nn.Module, str, Tensor]]  # by the module and name that hold them
    mode: Mode
    layer: str | None  # the first that draws or couples, and which of these
    units: list[nn.Module]  # those that fully_shard was called on


def survey(model: nn.Module) -> Survey:
    """Walk over a model; a few microseconds, as it is done at every update.

    Raises:
        ModelError: a model that averages over ranks by itself, or has nothing to train.
    """
    names: dict[nn.Parameter, str] = {}
    buffers: list[tuple[nn.Module, str, Tensor]] = []
    mode: list[bool] = []
    units: list[nn.Module] = []
    layer = None
    todo, seen = [("", model)], set()
    while todo:  # `named_modules`, its generators unrolled
        prefix, module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        mode.append(module.training)
        for name, p in module._parameters.items():
            if p is not None and p.requires_grad and p not in names:
                names[p] = prefix + name
        for name, buffer in module._buffers.items():
            if buffer is not None:
                buffers.append((module, name, buffer))
        if shards.is_unit(module.__class__):  # type: ignore[arg-type]
            units.append(module)
        if _is_known(module.__class__):  # type: ignore[arg-type]
            habit = _habit(module)
            if habit and layer is None:
                layer = f"the {type(module).__name__} {prefix[:-1]!r} {habit}"
        if module._modules:
            children = [(f"{prefix}{n}.", m) for n, m in module._modules.items() if m is not None]
            todo += children[::-1]
    if not names:
        raise ModelError("expected a model with trainable parameters, got none.")
    parameters = {name: p for p, name in names.items()}
    return Survey(parameters, buffers, tuple(mode), layer, units)


def why_grains(model: nn.Module, found: Survey) -> str | None:
    """The first reason why the model must run grain by grain, None if there is none known."""
    if found.layer is not None:
        return found.layer
    return "the model draws random numbers" if draws(model, found) else None


def draws(model: nn.Module, found: Survey) -> bool | None:
    """Whether an update has shown the model, in its present mode, to draw; None: not seen yet."""
    return _seen.get(model, {}).get(found.mode)


def remember(model: nn.Module, found: Survey, *, draws: bool) -> None:
    """Note what an update has shown of a model in its present mode."""
    _seen.setdefault(model, {})[found.mode] = draws


@lru_cache(maxsize=1024)
def _is_known(kind: Any) -> bool:
    """Whether `_habit` has a word on modules of this type."""
    known = (
        _BatchNorm,
        _DropoutNd,
        nn.RNNBase,
        nn.MultiheadAttention,
        nn.DataParallel,
        nn.parallel.DistributedDataParallel,
    )
    return issubclass(kind, known)


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
    if isinstance(module, _BatchNorm):
        uses_batch = module.training or module.running_mean is None
        return "couples examples" if uses_batch else None
    if isinstance(module, _DropoutNd):
        return "draws random numbers" if module.training and module.p > 0 else None
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return "draws random numbers" if module.training and module.dropout > 0 else None
    return None
