"""What a model does that ties the examples of a micro-batch together.

A model that *draws* random numbers or *couples* examples runs one grain at a time. Layers of
torch that do so are known beforehand; draws anywhere else show when the states of the
generators are compared after a pass. NumPy's and `random`'s, which take longer to compare, are
watched until an update in the model's present mode has left them alone; what begins to draw
from them only later is not seen. Nor is a coupling outside of torch's layers.
"""

from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from anybatch import distributed
from anybatch.errors import ModelError

__all__ = ["check_model", "draws", "remember", "why_grains"]

# What updates have shown of a model in each of its modes (train or eval, by module).
_seen: WeakKeyDictionary[nn.Module, dict[tuple[bool, ...], bool]] = WeakKeyDictionary()


def check_model(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name.

    Raises:
        ModelError: a model that averages over ranks by itself, or has nothing to train.
    """
    if distributed.is_replica(model):
        raise ModelError(
            "expected the bare model, got one wrapped in DistributedDataParallel or DataParallel, "
            "which would average gradients a second time. Pass model.module, and group=... for "
            "the ranks."
        )
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ModelError("expected a model with trainable parameters, got none.")
    return parameters


def why_grains(model: nn.Module) -> str | None:
    """The first reason why the model must run grain by grain, None if there is none known."""
    for name, module in model.named_modules():
        if module.training or isinstance(module, _BatchNorm):
            verb = _habit(module)
            if verb:
                return f"the {type(module).__name__} {name!r} {verb}"
    return "the model draws random numbers" if draws(model) else None


def draws(model: nn.Module) -> bool | None:
    """Whether an update has shown the model, in its present mode, to draw; None: not seen yet."""
    return _seen.get(model, {}).get(_mode(model))


def remember(model: nn.Module, *, draws: bool) -> None:
    """Note what an update has shown of a model in its present mode."""
    _seen.setdefault(model, {})[_mode(model)] = draws


def _mode(model: nn.Module) -> tuple[bool, ...]:
    return tuple(module.training for module in model.modules())


def _habit(module: nn.Module) -> str | None:
    if isinstance(module, nn.SyncBatchNorm) and module.training:
        raise ModelError(
            "SyncBatchNorm couples whatever the ranks hold at the moment, so its statistics depend "
            "on the layout. Use BatchNorm: its statistics are those of a grain, in every layout."
        )
    if isinstance(module, _BatchNorm):
        uses_batch = module.training or module.running_mean is None
        return "couples examples" if uses_batch else None
    if isinstance(module, _DropoutNd):
        return "draws random numbers" if module.p > 0 else None
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return "draws random numbers" if module.dropout > 0 else None
    return None
