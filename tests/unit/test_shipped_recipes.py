"""Every recipe that ships is valid, says what it was made from, and builds where its data are."""

import re
import tomllib
from pathlib import Path

import pytest

from anybatch.data.idx import DEBIAN
from anybatch.recipe.build import build
from anybatch.recipe.files import format_recipe, parse_recipe, read_recipe
from anybatch.shipped import summary_of

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


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_summary_of_a_recipe_is_its_first_paragraph(path):
    paragraph = path.read_text().partition("\n#\n")[0]
    assert summary_of(path) == " ".join(paragraph.replace("\n#", "").removeprefix("#").split())
    assert len(summary_of(path)) > 20


SYSTEMS = [path for path in RECIPES if path.stem.startswith(("tf-", "caffe-", "dln-", "ng", "goy"))]


@pytest.mark.parametrize("path", SYSTEMS, ids=lambda path: path.stem)
def test_the_head_of_a_system_names_the_version_of_its_original(path):
    assert len(SYSTEMS) == 16
    head = path.read_text().partition("\n\n")[0]
    commits = re.findall(r"\b[0-9a-f]{12}\b", head)
    undated = "carries neither a version nor a date" in head
    assert commits or undated or "30 April 2018" in head


@pytest.mark.parametrize("name", ["tf-cifar10-digits", "caffe-lenet-digits"])
def test_every_batch_of_a_system_with_full_batches_is_full(name):
    setup = build(read_recipe(RECIPES[0].with_name(f"{name}.toml")), allow_code=False)
    order, size = setup.order, setup.recipe.batch.size
    num_updates = 3 * 1438 // size
    assert order.num_steps(3) == num_updates
    counts = [order.examples_before(i + 1) - order.examples_before(i) for i in range(num_updates)]
    assert set(counts) == {size}
    assert 1438 % size  # the control: without `carry` an epoch would end in a short batch


@pytest.mark.parametrize(
    ("name", "num_train"), [("ng-digits", 1438), ("goyal-digits", 1438), ("goyal", 60_000)]
)
def test_the_head_states_the_short_last_batch_of_an_epoch(name, num_train):
    recipe = read_recipe(RECIPES[0].with_name(f"{name}.toml"))
    head = " ".join(RECIPES[0].with_name(f"{name}.toml").read_text().replace("\n#", "").split())
    rest = num_train % recipe.batch.size
    assert recipe.batch.last == "keep"
    assert f"Each epoch ends in a batch of {rest}, which takes the mean over {rest}" in head
