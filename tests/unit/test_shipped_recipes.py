"""Every recipe that ships is valid, says what it was made from, and builds where its data are."""

import re
import tomllib
from pathlib import Path

import pytest

from anybatch.data.idx import DEBIAN
from anybatch.recipe.build import build
from anybatch.recipe.files import format_recipe, parse_recipe, read_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


@pytest.mark.fast(2)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_builds_and_survives_being_written(path):
    recipe = read_recipe(path)
    if recipe.data.name == "fashion_mnist" and not Path(DEBIAN).is_dir():
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    setup = build(recipe, allow_code=False)
    assert setup.order.num_steps(recipe.run.epochs) > recipe.run.epochs
    assert parse_recipe(tomllib.loads(format_recipe(recipe)), "the resolved recipe") == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_head_of_a_recipe_says_what_the_original_did_and_what_differs(path):
    lines = path.read_text().splitlines()
    head = " ".join(line[1:].strip() for line in lines[: lines.index("")])
    assert "The original" in head
    assert re.search(r"\b[Hh]ere\b", head)
