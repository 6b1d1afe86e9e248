"""A recipe to be rescaled: its sizes, its rule, and what the numbers of its optimiser mean.

    g' = B g  makes the same path,  if each number x becomes  x' = B^p x

as Sum is B times Mean. p = -1 for the rate of SGD, which multiplies g, and 0 where g is divided by
its own size; 1 for what is added to g or compared with it: a coupled decay, an epsilon; 2 for what
is added to its square.
"""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from anybatch.batch import is_count
from anybatch.errors import RecipeError
from anybatch.recipe.code import is_code
from anybatch.recipe.names import suggest_name
from anybatch.recipe.optimizers import OPTIMIZERS
from anybatch.recipe.scaling.changes import RULES, Path, check_number
from anybatch.recipe.schema import OptimizerSection, Recipe

__all__ = [
    "ADASCALE",
    "KINDS",
    "Case",
    "OptimizerKind",
    "find_kind",
    "find_numbers",
    "list_terms",
    "make_case",
]

ADASCALE = "adascale"
"""The rate is measured in training, and the recipe's own stays."""

LARGEST = 2**31  # examples; above any batch there is, and below where floats lose count

OTHER_OBJECTIVES = {
    "max": "the largest of more losses is larger",
    "top_fraction": "the largest of more losses lie further out",
    "tilted": "the logarithm of a mean of more terms has another expectation",
}


@dataclass(frozen=True, slots=True)
class OptimizerKind:
    """An optimiser whose numbers are understood."""

    rule: str  # that `auto` takes
    powers: Mapping[str, int]  # p of each number that is not 0
    retained: tuple[str, ...] = ()  # moving averages, by what they keep of themselves an update
    is_decoupled: bool = False  # the decay is none of the gradient


_SGD = {"lr": -1, "weight_decay": 1}


_DIVIDED = {"eps": 1, "weight_decay": 1}


KINDS: Mapping[str, OptimizerKind] = {
    "sgd": OptimizerKind("linear", _SGD),
    "caffe_sgd": OptimizerKind("linear", _SGD),
    "adagrad": OptimizerKind("adagrad", _DIVIDED | {"initial_accumulator_value": 2}),
    "rmsprop": OptimizerKind("sqrt", _DIVIDED, ("alpha",)),
    "adam": OptimizerKind("sqrt", _DIVIDED, ("betas",)),
    "adamw": OptimizerKind("sqrt", {"eps": 1}, ("betas",), is_decoupled=True),
}


@dataclass(frozen=True, slots=True)
class Case:
    """A recipe, and where it is carried."""

    recipe: Recipe
    kind: OptimizerKind | None  # of its optimiser; None: not known, and then the rule is "none"
    rule: str
    old: int  # examples of an update
    new: int
    is_summed: bool

    @property
    def k(self) -> float:
        """New size over old."""
        return self.new / self.old

    def by_sum(self, power: int) -> float:
        """What a number of that power is multiplied by for the gradient of Sum, which has grown
        with the batch; "none" leaves it so."""
        return self.k**power if self.is_summed and self.rule != "none" else 1.0


def make_case(recipe: Recipe, batch_size: int, rule: str) -> Case:
    """See that a recipe can be carried.

    Raises:
        RecipeError: it cannot.
    """
    if not is_count(batch_size) or batch_size > LARGEST:
        raise RecipeError(
            f"batch_size = {batch_size!r}, expected the examples of an update, an integer of at "
            f"least 1 and at most {LARGEST:,}."
        )
    asked = recipe.batch.scaling if rule == "auto" else rule
    if rule not in RULES:
        raise RecipeError(f"there is no rule {rule!r}; {suggest_name(str(rule), RULES)}")
    kind = find_kind(recipe.optimizer)
    return Case(
        recipe=recipe,
        kind=kind,
        rule=_choose_rule(recipe.optimizer.name, kind, asked),
        old=recipe.batch.reference_size or recipe.batch.size,
        new=batch_size,
        is_summed=_is_summed(recipe.objective.reduction, asked),
    )


def list_terms(reduction: str | Mapping[str, Any]) -> Iterator[tuple[Path, str, Mapping[str, Any]]]:
    """Each term's reduction: its place, its name, its arguments."""
    where: Path = ("objective", "reduction")
    if isinstance(reduction, str) or "name" in reduction:
        yield where, *_get_name(reduction)
        return
    for term, one in reduction.items():
        yield (*where, term), *_get_name(one)


def _get_name(given: Any) -> tuple[str, Mapping[str, Any]]:
    if isinstance(given, Mapping):
        return str(given.get("name")), given
    return str(given), {}


def _choose_rule(optimizer: str, kind: OptimizerKind | None, asked: str) -> str:
    """The rule, by its own name."""
    if asked == "none":
        return asked
    if kind is None:
        what = "code of yours" if is_code(optimizer) else "no optimiser with a rule that is known"
        raise RecipeError(
            f"optimizer.name = {optimizer!r} is {what}, expected one of: {', '.join(KINDS)}. Take "
            f"--rule none, which carries what else is counted in updates, and set the rate by hand."
        )
    if asked == ADASCALE and kind.rule != "linear":
        raise RecipeError(
            f"batch.scaling = 'adascale' is a rule for sgd and caffe_sgd, got {optimizer!r}: its "
            f"gain is that of an update in proportion to the gradient. Expected auto."
        )
    if asked == "half-life" and kind.rule != "linear":
        raise RecipeError(
            f"half-life is a rule for the momentum of sgd and caffe_sgd, got {optimizer!r}: its "
            f"rate does not multiply a sum of gradients. Take auto, by which the moving averages "
            f"of Adam and RMSProp keep their half-life too."
        )
    return kind.rule if asked == "auto" else asked


def _is_summed(reduction: str | Mapping[str, Any], asked: str) -> bool:
    names = {name for _, name, _ in list_terms(reduction)}
    if asked == ADASCALE and names != {"mean"}:
        raise RecipeError(
            f"batch.scaling = 'adascale' expects objective.reduction = 'mean', got "
            f"{' and '.join(sorted(names))}: its gain is that of a mean over more examples."
        )
    for name in sorted(names & OTHER_OBJECTIVES.keys()):
        raise RecipeError(
            f"objective.reduction = {name!r} is another objective at another batch size: "
            f"{OTHER_OBJECTIVES[name]}. Expected mean, sum or group_dro; keep the batch, and "
            f"change batch.micro_batch if memory is short."
        )
    unknown = sorted(names - {"mean", "sum", "group_dro"})
    if unknown and asked != "none":
        raise RecipeError(
            f"objective.reduction {unknown[0]!r}: nothing is known of how it goes with the batch "
            f"size, expected mean, sum or group_dro. Take --rule none, and set the rate by hand."
        )
    if "sum" in names and len(names) > 1:
        raise RecipeError(
            f"the terms of objective.reduction are {', '.join(sorted(names))}: one is summed, and "
            f"would outgrow the others in a larger batch, expected all of them summed or none."
        )
    return names == {"sum"}


def find_kind(section: OptimizerSection) -> OptimizerKind | None:
    """What is known of a recipe's optimiser; None: nothing."""
    if section.name == "adam" and section.args.get("decoupled_weight_decay"):
        return KINDS["adamw"]
    return KINDS.get(section.name)


def find_numbers(section: OptimizerSection, name: str) -> Iterator[tuple[Path, Any]]:
    """Where an argument of the optimiser is stated, and its value: its own, the default where the
    recipe does not state it, and that of each group that has one of its own.

    Raises:
        RecipeError: what is no number, or no list of numbers.
    """
    own = section.args.get(name, _find_default(section.name, name))
    if own is not None:
        path: Path = ("optimizer", "args", name)
        yield path, check_number(path, own)
    for number, group in enumerate(section.groups):
        if name in (group.model_extra or {}):
            path = ("optimizer", "groups", number, name)
            yield path, check_number(path, (group.model_extra or {})[name])


def _find_default(optimizer: str, name: str) -> Any:
    if is_code(optimizer):
        return None
    parameter = inspect.signature(OPTIMIZERS[optimizer]).parameters.get(name)
    return None if parameter is None else parameter.default
