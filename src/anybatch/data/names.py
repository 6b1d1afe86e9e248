"""Names of the classes and features of the data of a recipe.

They are for people who look at examples; nothing is trained on them. Some data have none.
"""

import csv
from collections.abc import Mapping, Sequence
from typing import Any

from anybatch.data.columns import Columns, choose_inputs
from anybatch.data.hugging_face import open_split
from anybatch.data.parquet import read_schema

__all__ = ["class_names", "feature_names"]

CLASSES: dict[str, tuple[str, ...]] = {
    "cifar10": (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ),
    "fashion_mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
}
DIABETES = ("age", "sex", "bmi", "bp", "tc", "ldl", "hdl", "tch", "ltg", "glu")
TESTAMENTS = ("Old Testament", "New Testament")


def class_names(source: str, args: Mapping[str, Any]) -> Sequence[str]:
    """Return the names of the classes, in their order; empty if they have none.

    Args:
        source: the name of the data set in `sources`.
        args: the arguments that it is loaded with.
    """
    labels = args.get("labels")
    if isinstance(labels, list) and all(isinstance(label, str) for label in labels):
        return labels
    if source == "verses" and args.get("target", "testament") == "testament":
        return TESTAMENTS
    if source == "hugging_face":
        target = open_split(args["path"], args.get("split")).features[args["target"]]
        return getattr(target, "names", None) or ()
    return CLASSES.get(source, ())


def feature_names(source: str, args: Mapping[str, Any]) -> Sequence[str]:
    """Return the names of the input columns of a table, in their order; empty if there are none.

    Args:
        source, args: as in `class_names`.
    """
    if source == "diabetes":
        return DIABETES
    if source not in ("csv", "parquet", "hugging_face"):
        return ()
    path, target = args["path"], args["target"]
    inputs, weights = args.get("inputs"), args.get("weights")
    if source == "csv":
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file, delimiter=args.get("delimiter", ",")))
        return choose_inputs(path, header, target, inputs, weights)
    is_file = source == "parquet"
    schema = read_schema(path) if is_file else open_split(path, args.get("split")).data.schema
    return Columns.choose(path, schema, target, inputs, None, weights).inputs
