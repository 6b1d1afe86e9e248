"""Settings of a run that may not change on resume, as plain JSON: all that changes arithmetic.

Number of epochs, layout, checkpoints and trackers may change.
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
from anybatch.runs.data_fingerprint import DATA, RANKS_SHARE
from anybatch.runs.digest import digest

__all__ = ["ENVIRONMENT", "collect_settings", "compare_ranks", "compare_settings", "describe"]

ENVIRONMENT = "environment"
"""Setting of bitwise runs that may change on resume if it is accepted: see
`environment.describe_arithmetic`."""


def collect_settings(
    model: nn.Module,
    objective: Objective,
    optimizer: Optimizer,
    order: OrderProtocol,
    **others: Any,
) -> dict[str, Any]:
    """Collect the settings of a run by name."""
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
            "groups": [_describe_group(group, names) for group in optimizer.param_groups],
        },
        "order": describe(order),
        # A user's order may have a repr without its content, so its first batch counts too.
        "order_begins": digest(order.indices(0)),
        **{name: describe(other) for name, other in others.items()},
    }


def compare_settings(
    folder: Path,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    accept_environment: bool = False,
    accept: Collection[str] = (),
) -> dict[str, Any]:
    """Check that a run continues with the settings that it began with.

    Args:
        accept_environment: whether "environment" may differ.
        accept: names of further settings that may differ, such as the order of other data.

    Returns:
        The differences that were accepted: {place: {"old": ..., "new": ...}}.

    Raises:
        RunError: the message names the first setting that differs.
    """
    accepted = {}
    names = {*before, *now} - {DATA}  # `check_data` compares the data
    for name in sorted(
        names, key=lambda name: (name != "loop", name)
    ):  # another kind of loop first
        for place, old, new in _find_differences(before.get(name), now.get(name), name):
            if name not in (ENVIRONMENT, *accept):
                raise RunError(
                    f"{folder} was begun with {place} = {old!r}, and cannot go on with {new!r}: "
                    f"the run would be neither. Restore the setting, or begin a new run in another "
                    f"folder."
                )
            accepted[place] = {"old": old, "new": new}
    for place, values in accepted.items():
        if place.startswith(ENVIRONMENT) and not accept_environment:
            raise RunError(_explain_environment(folder, place, **values))
    return accepted


def compare_ranks(
    model: nn.Module, settings: Mapping[str, Any], group: ProcessGroup | None
) -> None:
    """Check that all ranks begin with the same settings and the same weights.

    Raises:
        RunError: the message names the first difference from rank 0, and the rank.
    """
    if group is None:
        return
    tensors = fsdp.drop_shards(
        dict((*unwrap(model).named_parameters(), *unwrap(model).named_buffers()))
    )
    local = {
        name: {key: value[key] for key in RANKS_SHARE} if name == DATA else value
        for name, value in settings.items()
    }
    per_rank = distributed.all_gather_object(
        lambda: {"settings": local} | {"weights": {n: digest(t) for n, t in tensors.items()}}, group
    )
    for rank, other in enumerate(per_rank):
        for place, first, value in _find_differences(per_rank[0], other):
            raise RunError(
                f"rank {rank} begins with {place} = {value!r} and rank 0 with {first!r}. "
                f"{_advise_ranks(place)}"
            )


def _advise_ranks(place: str) -> str:
    if place.startswith(f"settings.{ENVIRONMENT}"):
        return (
            "With bitwise=True all must compute the same bits. Use the same versions, kind of "
            "machine and threads on all ranks: torch.set_num_threads, or run.threads."
        )
    if place.startswith(f"settings.{DATA}"):
        return "They would train on different data. Give all ranks the same data set."
    return (
        "They would train different models. Pass the same arguments on all ranks, and call "
        "torch.manual_seed before the model is made."
    )


def describe(thing: Any) -> Any:
    """Convert a value to JSON: the same in every process, without addresses in memory."""
    if isinstance(thing, float) and not math.isfinite(thing):
        return repr(thing)
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if isinstance(thing, Mapping):
        return {
            name if isinstance(name, str) else _print(name): describe(value)
            for name, value in thing.items()
        }
    if isinstance(thing, list | tuple):
        return [describe(value) for value in thing]
    if isinstance(thing, Tensor | np.ndarray):  # its repr may be shortened, or rounded
        return describe(thing.tolist()) if thing.ndim == 0 else digest(thing)
    return _print(thing)


def _print(thing: Any) -> str:
    """Print a value as `repr` does, but with sorted sets and without addresses."""
    if isinstance(thing, set | frozenset):
        items = ", ".join(sorted(map(_print, thing)))
        if not items:
            return f"{type(thing).__name__}()"
        return f"{{{items}}}" if type(thing) is set else f"{type(thing).__name__}({{{items}}})"
    if type(thing) in (list, tuple):
        left, right = "[]" if isinstance(thing, list) else "()"
        comma = "," * (right == ")" and len(thing) == 1)
        return f"{left}{', '.join(map(_print, thing))}{comma}{right}"
    if type(thing) is dict:
        pairs = (f"{_print(key)}: {_print(value)}" for key, value in thing.items())
        return f"{{{', '.join(pairs)}}}"
    if type(thing) is partial:
        keywords = [f"{name}={_print(value)}" for name, value in thing.keywords.items()]
        arguments = [*map(_print, (thing.func, *thing.args)), *keywords]
        return f"functools.partial({', '.join(arguments)})"
    if is_dataclass(thing) and hasattr(type(thing).__repr__, "__wrapped__"):
        # Its repr is the one that `dataclasses` writes: print each field without addresses.
        values = (f"{f.name}={_print(getattr(thing, f.name))}" for f in fields(thing) if f.repr)
        return f"{type(thing).__qualname__}({', '.join(values)})"
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(thing))
    return text.replace(hex(id(thing)), "").replace(str(id(thing)), "")


def _describe_group(group: Mapping[str, Any], names: Mapping[int, str]) -> dict[str, Any]:
    """Describe a parameter group, with its learning rate at the start of the run."""
    settings = {**group, "params": [names[id(p)] for p in group["params"]]}
    if "initial_lr" in settings:
        settings["lr"] = settings.pop("initial_lr")
    return {name: describe(value) for name, value in settings.items()}


def _explain_environment(folder: Path, place: str, old: Any, new: Any) -> str:
    what, _, name = place.removeprefix(f"{ENVIRONMENT}.").partition(".")
    fixes = {
        "threads": f"Call torch.set_num_threads({old}) before, or set run.threads in the recipe",
        "variables": f"Set {name} as it was before Python starts",
        "compiled": "Compile the same modules",
    }
    fixes |= {package: f"Install {package}=={old}" for package in ("anybatch", "torch", "numpy")}
    return (
        f"{folder} was made with {place} = {old!r}, and here it is {new!r}. With bitwise=True all "
        f"bits must stay the same, and they may depend on it. "
        f"{fixes.get(what, 'Go on where it is as it was')}; or accept other bits from here on, "
        f"which the run's records will say: anybatch resume --accept-environment, or "
        f"Run(..., accept_environment=True)."
    )


def _find_differences(old: Any, new: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield each place where two JSON values differ, with both values there."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            inside = f"{place}.{key}" if place else key
            yield from _find_differences(old.get(key), new.get(key), inside)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (left, right) in enumerate(zip(old, new, strict=True)):
            yield from _find_differences(left, right, f"{place}[{i}]")
    elif old != new:
        yield place, old, new
