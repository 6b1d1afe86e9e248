"""A URL is refused by its scheme wherever a path is taken, and no folder of its name is made.

The control is the same command with a local path that looks like one.
"""

import re

import pytest

import anybatch as ab
from anybatch.data import load_cifar10, load_csv, load_idx, load_npz, load_text
from anybatch.errors import DataError, RunError
from anybatch.paths import find_scheme
from command_line import anybatch, refuse, write_recipe

URLS = ["s3://bucket/it", "https://host/it", "hf://datasets/it", "gs://bucket/it", "file:///tmp/it"]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path)


def paths_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize(
    "command",
    [
        ["train", "recipe.toml", "--out"],
        ["train"],
        ["resume"],
        ["evaluate"],
        ["predict", "run", "--out"],
        ["export", "run", "--out"],
        ["explain", "run", "--out"],
        ["compare", "recipe.toml", "recipe.toml", "--out"],
        ["compare", "recipe.toml"],
        ["advise", "recipe.toml", "--html"],
        ["scale", "recipe.toml", "--batch-size", "8", "--out"],
        ["train", "recipe.toml", "--set", "data.name=csv", "--set", "data.args.target=y", "--set"],
        ["train", "recipe.toml", "--set"],
    ],
)
def test_commands_name_the_url_and_make_nothing(recipe, command, url):
    before, value = paths_below(recipe.parent), url
    if command[-1] == "--set":
        value = f"data.args.path={url}" if "data.name=csv" in command else f"model.weights={url}"
    message = refuse(*command, value)
    assert f"{url} is a URL" in message
    assert f"{url.partition(':')[0]}:// is not supported" in message
    assert paths_below(recipe.parent) == before


@pytest.mark.parametrize("url", URLS)
def test_python_refuses_them_too(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    named = re.escape(f"{url} is a URL")
    with pytest.raises(RunError, match=named):
        ab.Run(url)
    for load in (lambda: load_csv(url, "y"), lambda: load_npz(url), lambda: load_text(url)):
        with pytest.raises(DataError, match=named):
            load()
    for load in (lambda: load_cifar10(url), lambda: load_idx(url, url)):
        with pytest.raises(DataError, match=named):
            load()
    assert paths_below(tmp_path) == []


def test_local_paths_that_look_like_urls_are_none(recipe, tmp_path):
    for path in ("runs/s3", "C:/runs", "a:b", "s3:name", "./s3://x", "package.module:function"):
        assert find_scheme(path) is None
    assert anybatch("train", "recipe.toml", "--out", "s3").code == 0
    assert (tmp_path / "s3/run.json").is_file()
    assert find_scheme("S3:/collapsed/by/pathlib") == "s3"


def test_the_place_is_named(recipe):
    asked = ["--set", "data.name=csv", "--set", 'data.args={path="s3://b/rows.csv",target="y"}']
    assert "data.args.path: s3://b/rows.csv is a URL" in refuse("train", "recipe.toml", *asked)
    assert "--out: gs://b/run is a URL" in refuse("train", "recipe.toml", "--out", "gs://b/run")
    assert "RUN: s3://b/run is a URL" in refuse("verify", "s3://b/run")
