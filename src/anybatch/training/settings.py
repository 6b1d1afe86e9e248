"""What a run may not change on resume, as plain JSON: all that changes arithmetic.

The number of epochs, the layout, checkpoints and trackers are not among them.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from anybatch import distributed
from anybatch.compiled import unwrap
from anybatch.distributed import ProcessGroup, fsdp
from anybatch.errors import RunError
from anybatch.objective import Objective
from anybatch.order import OrderProtocol
from anybatch.training.data_fingerprint import DATA, RANKS_SHARE
from anybatch.training.digest import digest

__all__ = ["ENVIRONMENT", "check_alike", "compare", "describe", "settings_of"]

ENVIRONMENT = "environment"
"""The setting, of bitwise runs, that may change on resume where it is accepted: see
`environment.arithmetic`."""


def settings_of(
    model: nn.Module,
    objective: Objective,
    optimizer: Optimizer,
    order: OrderProtocol,
    **others: Any,
) -> dict[str, Any]:
    """The settings of a run by name."""
    model = unwrap(model)
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        "model": {
            name: [str(p.dtype), *p.shape, "trained" if p.requires_grad else "frozen"]
            for name, p in model.named_parameters()
        },
        "example_losses": describe(objective.example_losses),
        "reduction": {name: describe(r) for name, r in objective.reductions.items()},
        "penalty": [describe(term) for term in objective.penalty or ()],
        "grain": objective.grain,
        "optimizer": {
            "class": type(optimizer).__qualname__,
            "groups": [_group(group, names) for group in optimizer.param_groups],
        },
        "order": describe(order),
        "order_begins": digest(order.indices(0)),  # an order of the user's may not print itself
        **{name: describe(other) for name, other in others.items()},
    }


def compare(
    folder: Path,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    accept_environment: bool = False,
    accept: Collection[str] = (),
) -> dict[str, Any]:
    """See that a run goes on with the settings that it was begun with.

    Args:
        accept_environment: whether another "environment" is none to refuse.
        accept: names of further settings that may differ, such as the order of other data.

    Returns:
        What was accepted: {place: {"old": ..., "new": ...}}.

    Raises:
        RunError: naming the first that differs.
    """
    accepted = {}
    for name in sorted({*before, *now} - {DATA}):  # `check_data` compares it
        for place, old, new in _differences(before.get(name), now.get(name), name):
            if name not in (ENVIRONMENT, *accept):
                raise RunError(
                    f"{folder} was begun with {place} = {old!r}, and cannot go on with {new!r}: "
                    f"the run would be neither. Restore the setting, or begin a new run in another "
                    f"folder."
                )
            accepted[place] = {"old": old, "new": new}
    surroundings = [one for one in accepted.items() if one[0].startswith(ENVIRONMENT)]
    if surroundings and not accept_environment:
        place, values = surroundings[0]
        raise RunError(_other_environment(folder, place, **values))
    return accepted


def check_alike(model: nn.Module, settings: Mapping[str, Any], group: ProcessGroup | None) -> None:
    """See that all ranks begin with the same settings and the same weights.

    Raises:
        RunError: naming the first that differs from the first rank's, and the rank.
    """
    if group is None:
        return
    tensors = fsdp.drop_shards(
        dict((*unwrap(model).named_parameters(), *unwrap(model).named_buffers()))
    )
    compared = {
        name: {key: value[key] for key in RANKS_SHARE} if name == DATA else value
        for name, value in settings.items()
    }
    told = distributed.all_gather_object(
        lambda: {"settings": compared} | {"weights": {n: digest(t) for n, t in tensors.items()}},
        group,
    )
    for rank, other in enumerate(told):
        for place, first, own in _differences(told[0], other):
            what_now = (
                "they would train different models. Pass the same arguments everywhere, and call "
                "torch.manual_seed before the model is made."
            )
            if place.startswith(f"settings.{ENVIRONMENT}"):
                what_now = (
                    "with bitwise=True all compute the same bits. Let all ranks have the same "
                    "versions, kind of machine and threads: torch.set_num_threads, or run.threads."
                )
            if place.startswith(f"settings.{DATA}"):
                what_now = "they would train on different data. Give all ranks the same data set."
            raise RunError(
                f"rank {rank} begins with {place} = {own!r} and rank 0 with {first!r}, expected "
                f"the same on all: {what_now}"
            )


def describe(thing: Any) -> Any:
    """Build a value that JSON keeps: the same in every process, without addresses in memory."""
    if isinstance(thing, float) and not math.isfinite(thing):
        return repr(thing)
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if isinstance(thing, Mapping):
        return {_key(name): describe(value) for name, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [describe(value) for value in thing]
    if isinstance(thing, Tensor | np.ndarray):  # too long to print in full, or to full precision
        return describe(thing.tolist()) if thing.ndim == 0 else digest(thing)
    return _print(thing)


def _key(name: Any) -> str:
    return name if isinstance(name, str) else _print(name)


def _print(thing: Any) -> str:
    """Print a value as `repr` does, but for sets in sorted order and without addresses."""
    if isinstance(thing, set | frozenset):
        items = ", ".join(sorted(map(_print, thing)))
        if not items:
            return f"{type(thing).__name__}()"
        return f"{{{items}}}" if type(thing) is set else f"{type(thing).__name__}({{{items}}})"
    if type(thing) in (list, tuple):
        begin, end = "[]" if isinstance(thing, list) else "()"
        return (
            f"{begin}{', '.join(map(_print, thing))}{',' * (end == ')' and len(thing) == 1)}{end}"
        )
    if type(thing) is dict:
        pairs = (f"{_print(key)}: {_print(value)}" for key, value in thing.items())
        return f"{{{', '.join(pairs)}}}"
    if type(thing) is partial:
        keywords = [f"{name}={_print(value)}" for name, value in thing.keywords.items()]
        return (
            f"functools.partial({', '.join([*map(_print, (thing.func, *thing.args)), *keywords])})"
        )
    if _is_printed_by_field(thing):
        shown = (f"{f.name}={_print(getattr(thing, f.name))}" for f in fields(thing) if f.repr)
        return f"{type(thing).__qualname__}({', '.join(shown)})"
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(thing))
    return text.replace(hex(id(thing)), "").replace(str(id(thing)), "")


def _is_printed_by_field(thing: Any) -> bool:
    """Whether a thing is a dataclass with the `repr` that `dataclasses` writes."""
    return is_dataclass(thing) and hasattr(type(thing).__repr__, "__wrapped__")


def _group(group: Mapping[str, Any], names: Mapping[int, str]) -> dict[str, Any]:
    """A parameter group's settings, with the rate that it began with."""
    begun = {**group, "params": [names[id(p)] for p in group["params"]]}
    if "initial_lr" in begun:
        begun["lr"] = begun.pop("initial_lr")
    return {name: describe(value) for name, value in begun.items()}


def _other_environment(folder: Path, place: str, old: Any, new: Any) -> str:
    what, _, name = place.removeprefix(f"{ENVIRONMENT}.").partition(".")
    mend = {
        "threads": f"Call torch.set_num_threads({old}) before, or set run.threads in the recipe",
        "variables": f"Set {name} as it was before Python starts",
        "compiled": "Compile the same modules",
    }
    mend |= {package: f"Install {package}=={old}" for package in ("anybatch", "torch", "numpy")}
    return (
        f"{folder} was made with {place} = {old!r}, and here it is {new!r}: with bitwise=True the "
        f"same bits are expected all through, and they may depend on it. "
        f"{mend.get(what, 'Go on where it is as it was')}; or accept other bits from here on, "
        f"which the run's records will say: anybatch resume --accept-environment, or "
        f"Run(..., accept_environment=True)."
    )


def _differences(old: Any, new: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The places where two JSON values differ, and both values there."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            inside = f"{place}.{key}" if place else key
            yield from _differences(old.get(key), new.get(key), inside)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _differences(one, other, f"{place}[{i}]")
    elif old != new:
        yield place, old, new
