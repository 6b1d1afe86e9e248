"""Recipes to compare, and the folder of their runs: each recipe with each seed, on the same data.

    FOLDER/comparison.json          the recipes by name, as TOML; the fingerprint of the data; the
                                    differences of each time that other data were accepted
    FOLDER/NAME/seed-S/             the run of a recipe with a seed, and its outcome

Runs that are in the folder are not made again. So a comparison that was cut off continues, and one
with more seeds makes only those. Other recipes make another comparison.
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
from anybatch.recipe.datasets import fingerprint_data, load_data
from anybatch.recipe.files import format_recipe
from anybatch.recipe.scaling import scale
from anybatch.recipe.schema import Recipe
from anybatch.runs.data_fingerprint import find_differences, parse_fingerprint
from anybatch.runs.disk import make_folder, read_file, replace_file

__all__ = [
    "Entry",
    "check_recipes",
    "list_accepted_data",
    "list_trials",
    "make_entries",
    "open_folder",
    "rescale_to_sizes",
]

_log = logging.getLogger(__name__)

_PLAN = "comparison.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One of the recipes to compare."""

    name: str
    recipe: Recipe
    allow_code: bool


def check_recipes(recipes: Sequence[str], sizes: str | None, num_seeds: int) -> None:
    """Check that there is something to compare: two recipes, or one at two batch sizes."""
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


def rescale_to_sizes(
    recipe: Recipe, name: str, allow_code: bool, sizes: str
) -> list[tuple[Recipe, str, bool]]:
    """Rescale a recipe to each of some batch sizes, by the rule that `anybatch scale` takes.

    Args:
        sizes: as typed, such as "32,128".

    Returns:
        Recipe, name and `allow_code` for each size, as `make_entries` takes them.

    Raises:
        RecipeError: the sizes are not two different numbers, or the recipe cannot be rescaled.
    """
    words = [word.strip() for word in sizes.split(",")]
    numbers = sorted({int(word) for word in words if word.isdecimal() and int(word) > 0})
    if len(numbers) < len(words) or len(numbers) < 2:
        raise RecipeError(
            f"--batch-size is {sizes!r}. Expected two different numbers above 0 or more, with "
            f"commas between them, such as --batch-size 32,128."
        )
    recipes = []
    for size in numbers:
        rescaled = recipe
        if size != recipe.batch.size:
            scaled = scale(
                recipe, batch_size=size, rule="auto", reduction=None, allow_code=allow_code
            )
            for warning in scaled.warnings:
                _log.warning("at %s: %s", size, warning)
            rescaled = scaled.recipe
        recipes.append((rescaled, f"{name}-{size}", allow_code))
    return recipes


def make_entries(recipes: Iterable[tuple[Recipe, str, bool]]) -> list[Entry]:
    """Give each recipe a name of its own, the seed of the first, and one thread if it sets none.

    Args:
        recipes: recipe, name, and whether its code may be imported.
    """
    entries: list[Entry] = []
    for recipe, stem, allow_code in recipes:
        names = {entry.name for entry in entries}
        name = next(n for k in count(1) if (n := stem if k == 1 else f"{stem}-{k}") not in names)
        seed = entries[0].recipe.run.seed if entries else recipe.run.seed
        keys = {"seed": seed, "threads": recipe.run.threads or 1}
        entries.append(Entry(name=name, recipe=_set_run(recipe, keys), allow_code=allow_code))
    _check_data(entries)
    return entries


def open_folder(entries: Sequence[Entry], out: Path | None, *, accept_data: bool = False) -> Path:
    """Find the comparison of these recipes, or make a folder for it.

    Each recipe is built once before a folder is made, so that mistakes are found first.

    Args:
        out: the folder; None: runs/compare-NAMES-N.
        accept_data: whether a comparison may continue on other data; comparison.json then says so.

    Raises:
        RunError: the folder `out` has something else in it, or its comparison was begun on other
            data, which are not accepted; and what `build` raises.
    """
    plan = {entry.name: format_recipe(entry.recipe) for entry in entries}
    if out is None:
        stem = "compare-" + "-".join(entry.name for entry in entries)
        out = next(p for n in count(1) if _can_hold(p := Path("runs") / f"{stem}-{n}", plan))
    elif not _can_hold(out, plan):
        raise RunError(
            f"{out} exists and is no comparison of these recipes. Expected a new folder, or one "
            f"that the same command has made. Was a recipe changed? Choose another by --out."
        )
    if out.exists():
        _compare_data(out, entries[0], accept=accept_data)
        return out
    setups = [build(entry.recipe, allow_code=entry.allow_code) for entry in entries]
    make_folder(out)
    _write_plan(out, {"recipes": plan, "data": setups[0].data_fingerprint})
    return out


def list_accepted_data(folder: Path) -> list[str]:
    """List the differences of each time that a comparison continued on other data."""
    return list(map(str, _read_plan(folder).get("accepted", ())))


def list_trials(
    entries: Sequence[Entry], folder: Path, num_seeds: int, *, accept_data: bool = False
) -> list[Trial]:
    """List the runs of a comparison, seed by seed."""
    first = entries[0].recipe.run.seed
    return [
        Trial(
            name=entry.name,
            recipe=_set_run(entry.recipe, {"seed": seed}),
            folder=folder / entry.name / f"seed-{seed}",
            allow_code=entry.allow_code,
            accept_data=accept_data,
        )
        for seed in range(first, first + num_seeds)
        for entry in entries
    ]


def _set_run(recipe: Recipe, keys: dict[str, int]) -> Recipe:
    """Set keys of [run]."""
    return recipe.model_copy(update={"run": recipe.run.model_copy(update=keys)})


def _check_data(entries: Sequence[Entry]) -> None:
    first, *others = (entry.recipe.data.model_dump(exclude={"workers"}) for entry in entries)
    for entry, data in zip(entries[1:], others, strict=True):
        for key, value in data.items():
            if value != first[key]:
                raise RecipeError(
                    f"data.{key} is {first[key]!r} in {entries[0].name} and {value!r} in "
                    f"{entry.name}. Only runs on the same data and split make pairs. Set it for "
                    f"all of them: --set data.{key}=..."
                )


def _compare_data(folder: Path, entry: Entry, *, accept: bool) -> None:
    """Check that the data are those that a comparison was begun on, or record that they differ."""
    plan = _read_plan(folder)
    before = parse_fingerprint(plan.get("data"), str(folder / _PLAN))
    if before is None:  # an earlier version wrote none
        return
    section, dtype = entry.recipe.data, getattr(torch, entry.recipe.run.dtype)
    data, splits = load_data(section, dtype, allow_code=entry.allow_code)
    now = fingerprint_data(section, data, splits)
    differences = "; ".join(find_differences(before, now))
    if differences and not accept:
        raise RunError(
            f"{folder} compares runs on other data than these: {differences}. Only runs on the "
            f"same data make pairs. Put the data back, or choose another folder by --out. "
            f"--accept-data continues in this folder, and the results then say so."
        )
    if differences:
        _log.warning("other data than the comparison's are accepted: %s", differences)
        accepted = [*plan.get("accepted", []), differences]
        _write_plan(folder, plan | {"data": now, "accepted": accepted})


def _write_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    replace_file(folder / _PLAN, [json.dumps(plan, indent=1) + "\n"])


def _read_plan(folder: Path) -> dict[str, Any]:
    """Read comparison.json."""
    plan = read_json(read_file(folder / _PLAN))
    if not (isinstance(plan, dict) and isinstance(plan.get("accepted", []), list)):
        raise ValueError(f"{_PLAN} is no JSON object as a comparison writes it")
    return plan


def _can_hold(folder: Path, plan: Mapping[str, str]) -> bool:
    """Return whether a folder is free, or holds a comparison of the same recipes."""
    if not folder.exists():
        return True
    try:
        return bool(_read_plan(folder)["recipes"] == plan)
    except (OSError, ValueError, LookupError):
        return False
