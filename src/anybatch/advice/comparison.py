"""Recipes compared by runs in pairs: each recipe with each seed, on the same data.

    FOLDER/comparison.json          the recipes by name, as TOML; the fingerprint of the data; what
                                    differed each time that other data were accepted
    FOLDER/NAME/seed-S/             the run of a recipe with a seed, and its outcome

What is there already is not made again, so a comparison that was cut off goes on, and one that is
asked for with more seeds makes only those. Another recipe makes another comparison.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch

from anybatch.advice.trial import Trial
from anybatch.errors import RecipeError, RunError
from anybatch.limits import read_json
from anybatch.recipe.build import build
from anybatch.recipe.datasets import data_of, fingerprint_of
from anybatch.recipe.files import text_of
from anybatch.recipe.scaling import scale
from anybatch.recipe.schema import Recipe
from anybatch.training.data_fingerprint import checked_fingerprint, find_differences
from anybatch.training.disk import make_folder, read_file, replace_file

__all__ = [
    "Entry",
    "accepted_data",
    "at_sizes",
    "check_recipes",
    "entries_of",
    "open_folder",
    "trials_of",
]

_log = logging.getLogger(__name__)

_PLAN = "comparison.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One of the recipes."""

    name: str
    recipe: Recipe
    allow_code: bool


def check_recipes(recipes: Sequence[str], sizes: str | None, num_seeds: int) -> None:
    """Check that there is something to compare: two recipes, or one at two batch sizes.

    Raises:
        RecipeError: there is not.
    """
    if sizes is not None and len(recipes) > 1:
        raise RecipeError(
            f"--batch-size compares one recipe at several batch sizes, but {len(recipes)} recipes "
            f"were given. Leave out --batch-size, or all recipes but one."
        )
    if sizes is None and len(recipes) < 2:
        raise RecipeError(
            f"there is nothing to compare {recipes[0]} with. Give a second recipe, or two batch "
            f"sizes: --batch-size 32,128. To train it alone from several seeds: anybatch train "
            f"{recipes[0]} --seeds {num_seeds}"
        )


def at_sizes(
    recipe: Recipe, name: str, allow_code: bool, sizes: str
) -> list[tuple[Recipe, str, bool]]:
    """Carry a recipe to each of some batch sizes, by the rule that `anybatch scale` takes.

    Args:
        sizes: as typed, such as "32,128".

    Raises:
        RecipeError: sizes that are no two different numbers, or a recipe that cannot be carried.
    """
    words = [word.strip() for word in sizes.split(",")]
    numbers = sorted({int(word) for word in words if word.isdecimal() and int(word) > 0})
    if len(numbers) < len(words) or len(numbers) < 2:
        raise RecipeError(
            f"--batch-size is {sizes!r}. Expected two different numbers above 0 or more, with "
            f"commas between them, such as --batch-size 32,128."
        )
    found = []
    for size in numbers:
        own = recipe
        if size != recipe.batch.size:
            done = scale(
                recipe, batch_size=size, rule="auto", reduction=None, allow_code=allow_code
            )
            for warning in done.warnings:
                _log.warning("at %s: %s", size, warning)
            own = done.recipe
        found.append((own, f"{name}-{size}", allow_code))
    return found


def entries_of(read: Iterable[tuple[Recipe, str, bool]]) -> list[Entry]:
    """The recipes of a comparison, each with a name of its own and the first one's seed.

    Their runs have one thread each, where a recipe does not say otherwise.

    Raises:
        RecipeError: recipes on different data.
    """
    entries: list[Entry] = []
    for recipe, stem, allow_code in read:
        taken = {entry.name for entry in entries}
        name = next(n for k in count(1) if (n := stem if k == 1 else f"{stem}-{k}") not in taken)
        seed = entries[0].recipe.run.seed if entries else recipe.run.seed
        run = recipe.run.model_copy(update={"seed": seed, "threads": recipe.run.threads or 1})
        own = recipe.model_copy(update={"run": run})
        entries.append(Entry(name=name, recipe=own, allow_code=allow_code))
    _check_data(entries)
    return entries


def open_folder(entries: Sequence[Entry], out: Path | None, *, accept_data: bool = False) -> Path:
    """Open the folder of the runs: a comparison of these recipes that is there, or a new one.

    Each recipe is built once before a folder is made, so that what is wrong with it is found then.

    Args:
        entries: the recipes.
        out: the folder; None: the first that fits below runs/.
        accept_data: whether a comparison may go on with other data; comparison.json then says so.

    Raises:
        RunError: a folder, chosen by `out`, of something else; other data than those that the
            comparison was begun on, and they are not accepted; and what `build` raises.
    """
    plan = {entry.name: text_of(entry.recipe) for entry in entries}
    if out is None:
        stem = "compare-" + "-".join(entry.name for entry in entries)
        out = next(p for n in count(1) if _fits(p := Path("runs") / f"{stem}-{n}", plan))
    elif not _fits(out, plan):
        raise RunError(
            f"{out} exists and is no comparison of these recipes, expected a new folder, or one "
            f"that the same command has made: was a recipe changed? Choose another by --out."
        )
    if out.exists():
        _compare_data(out, entries[0], accept=accept_data)
        return out
    built = [build(entry.recipe, allow_code=entry.allow_code) for entry in entries]
    make_folder(out)
    _write_plan(out, {"recipes": plan, "data": built[0].data_fingerprint})
    return out


def accepted_data(folder: Path) -> list[str]:
    """List what differed each time that a comparison went on with other data."""
    return list(map(str, _read_plan(folder).get("accepted", ())))


def trials_of(
    entries: Sequence[Entry], folder: Path, num_seeds: int, *, accept_data: bool = False
) -> list[Trial]:
    """List the runs of a comparison, pair by pair."""
    first = entries[0].recipe.run.seed
    return [
        Trial(
            name=entry.name,
            recipe=entry.recipe.model_copy(
                update={"run": entry.recipe.run.model_copy(update={"seed": seed})}
            ),
            folder=folder / entry.name / f"seed-{seed}",
            allow_code=entry.allow_code,
            accept_data=accept_data,
        )
        for seed in range(first, first + num_seeds)
        for entry in entries
    ]


def _check_data(entries: Sequence[Entry]) -> None:
    first, *others = (entry.recipe.data.model_dump(exclude={"workers"}) for entry in entries)
    for entry, data in zip(entries[1:], others, strict=True):
        for key, value in data.items():
            if value != first[key]:
                raise RecipeError(
                    f"data.{key} is {first[key]!r} in {entries[0].name} and {value!r} in "
                    f"{entry.name}, expected the same: only runs on the same data and split make "
                    f"pairs. Set it for all of them: --set data.{key}=..."
                )


def _compare_data(folder: Path, entry: Entry, *, accept: bool) -> None:
    """Check that a comparison goes on with the data that it was begun on, or record the change."""
    plan = _read_plan(folder)
    before = checked_fingerprint(plan.get("data"), str(folder / _PLAN))
    section, dtype = entry.recipe.data, getattr(torch, entry.recipe.run.dtype)
    if before is None:  # of an earlier version
        return
    data, parts = data_of(section, dtype, allow_code=entry.allow_code)
    now = fingerprint_of(section, data, parts)
    differences = find_differences(before, now)
    if differences and not accept:
        raise RunError(
            f"{folder} compares runs on other data than these: {'; '.join(differences)}. Only runs "
            f"on the same data make pairs. Put the data back, or choose another folder by --out. "
            f"--accept-data goes on in this folder, and its results then say so."
        )
    if differences:
        _log.warning("other data than the comparison's are accepted: %s", "; ".join(differences))
        accepted = [*plan.get("accepted", []), "; ".join(differences)]
        _write_plan(folder, plan | {"data": now, "accepted": accepted})


def _write_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    replace_file(folder / _PLAN, [json.dumps(plan, indent=1) + "\n"])


def _read_plan(folder: Path) -> dict[str, Any]:
    """Read what a comparison was begun with.

    Raises:
        RunError: no plain file; ValueError: no JSON object.
    """
    plan = read_json(read_file(folder / _PLAN))
    if not (isinstance(plan, dict) and isinstance(plan.get("accepted", []), list)):
        raise ValueError(f"{_PLAN} holds no object as a comparison writes it")
    return plan


def _fits(folder: Path, plan: Mapping[str, str]) -> bool:
    """Whether a folder is free, or holds a comparison of the same recipes."""
    if not folder.exists():
        return True
    try:
        return bool(_read_plan(folder)["recipes"] == plan)
    except (OSError, ValueError, LookupError):
        return False
