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

ADASCALE = "adascale"  # the rate is measured in training; the recipe's own stays

MAX_BATCH = 2**31  # examples; above any real batch, and below where floats lose count

OTHER_OBJECTIVES = {
    "max": "the largest of more losses is larger",
    "top_fraction": "the largest of more losses are further out",
    "tilted": "the logarithm of a mean of more terms has another expectation",
}


@dataclass(frozen=True, slots=True)
class OptimizerKind:
    """Optimiser whose numbers are understood."""

    rule: str  # that `auto` takes
    powers: Mapping[str, int]  # p of each number, where it is not 0
    averages: tuple[str, ...] = ()  # decays of moving averages, once an update
    is_decoupled: bool = False  # weight decay is not added to the gradient


_SGD = {"lr": -1, "weight_decay": 1}
_ADAPTIVE = {"eps": 1, "weight_decay": 1}
KINDS: Mapping[str, OptimizerKind] = {
    "sgd": OptimizerKind("linear", _SGD),
    "caffe_sgd": OptimizerKind("linear", _SGD),
    "adagrad": OptimizerKind("adagrad", _ADAPTIVE | {"initial_accumulator_value": 2}),
    "rmsprop": OptimizerKind("sqrt", _ADAPTIVE, ("alpha",)),
    "adam": OptimizerKind("sqrt", _ADAPTIVE, ("betas",)),
    "adamw": OptimizerKind("sqrt", {"eps": 1}, ("betas",), is_decoupled=True),
}


@dataclass(frozen=True, slots=True)
class Case:
    """Recipe, old and new batch size, and the rule to rescale by."""

    recipe: Recipe
    kind: OptimizerKind | None  # None: unknown, and then the rule is "none"
    rule: str
    old: int  # examples of an update
    new: int
    is_summed: bool

    @property
    def k(self) -> float:
        """New size over old."""
        return self.new / self.old

    def sum_factor(self, power: int) -> float:
        """Return k^power under Sum, whose gradient grows with the batch; else 1.

        The rule "none" changes nothing.
        """
        return self.k**power if self.is_summed and self.rule != "none" else 1.0


def make_case(recipe: Recipe, batch_size: int, rule: str) -> Case:
    """Check that a recipe can be rescaled, and choose the rule."""
    if not is_count(batch_size) or batch_size > MAX_BATCH:
        raise RecipeError(
            f"batch_size = {batch_size!r}. Expected the number of examples of an update: an "
            f"integer from 1 to {MAX_BATCH:,}."
        )
    if rule not in RULES:
        raise RecipeError(f"there is no rule {rule!r}; {suggest_name(str(rule), RULES)}")
    rule = recipe.batch.scaling if rule == "auto" else rule
    kind = find_kind(recipe.optimizer)
    return Case(
        recipe=recipe,
        kind=kind,
        rule=_choose_rule(recipe.optimizer.name, kind, rule),
        old=recipe.batch.reference_size or recipe.batch.size,
        new=batch_size,
        is_summed=_is_summed(recipe.objective.reduction, rule),
    )


def list_terms(reduction: str | Mapping[str, Any]) -> Iterator[tuple[Path, str, Mapping[str, Any]]]:
    """List path, name and arguments of the reduction of each term."""
    path: Path = ("objective", "reduction")
    terms: Mapping[Path, Any] = {path: reduction}
    if not isinstance(reduction, str) and "name" not in reduction:
        terms = {(*path, term): value for term, value in reduction.items()}
    for place, value in terms.items():
        args = value if isinstance(value, Mapping) else {"name": value}
        yield place, str(args.get("name")), args


def find_kind(section: OptimizerSection) -> OptimizerKind | None:
    """Find what is known of a recipe's optimiser; None: nothing."""
    if section.name == "adam" and section.args.get("decoupled_weight_decay"):
        return KINDS["adamw"]
    return KINDS.get(section.name)


def find_numbers(section: OptimizerSection, name: str) -> Iterator[tuple[Path, Any]]:
    """Find path and value of an argument: in the optimiser, or its default, and in each group.

    Raises:
        RecipeError: a value is no number and no list of numbers.
    """
    default = None
    if not is_code(section.name):
        parameter = inspect.signature(OPTIMIZERS[section.name]).parameters.get(name)
        default = None if parameter is None else parameter.default
    value = section.args.get(name, default)
    if value is not None:
        path: Path = ("optimizer", "args", name)
        yield path, check_number(path, value)
    for number, group in enumerate(section.groups):
        if name in (group.model_extra or {}):
            path = ("optimizer", "groups", number, name)
            yield path, check_number(path, (group.model_extra or {})[name])


def _choose_rule(optimizer: str, kind: OptimizerKind | None, rule: str) -> str:
    """Choose the rule for an optimiser, and check that it fits."""
    if rule == "none":
        return rule
    if kind is None:
        problem = "is code of yours" if is_code(optimizer) else "has no rule that is known"
        raise RecipeError(
            f"optimizer.name = {optimizer!r} {problem}. Rules are known for {', '.join(KINDS)}. "
            f"Use --rule none, which rescales what else is counted in updates, and set the rate "
            f"by hand."
        )
    if rule == ADASCALE and kind.rule != "linear":
        raise RecipeError(
            f"batch.scaling = 'adascale' is a rule for sgd and caffe_sgd, got {optimizer!r}. Its "
            f"gain is that of an update in proportion to the gradient. Use auto."
        )
    if rule == "half-life" and kind.rule != "linear":
        raise RecipeError(
            f"half-life is a rule for the momentum of sgd and caffe_sgd, got {optimizer!r}. The "
            f"rate of {optimizer} does not multiply a sum of gradients. Use auto: the moving "
            f"averages of Adam and RMSProp then keep their half-life too."
        )
    return kind.rule if rule == "auto" else rule


def _is_summed(reduction: str | Mapping[str, Any], rule: str) -> bool:
    """Return whether the reduction is Sum. Check that the rule fits it."""
    names = {name for _, name, _ in list_terms(reduction)}
    if rule == ADASCALE and names != {"mean"}:
        raise RecipeError(
            f"batch.scaling = 'adascale' needs objective.reduction = 'mean', got "
            f"{' and '.join(sorted(names))}. Its gain is that of a mean over more examples."
        )
    for name in sorted(names & OTHER_OBJECTIVES.keys()):
        raise RecipeError(
            f"objective.reduction = {name!r} is another objective at another batch size: "
            f"{OTHER_OBJECTIVES[name]}. Only mean, sum and group_dro can be rescaled. Keep the "
            f"batch, and change batch.micro_batch if memory is short."
        )
    unknown = sorted(names - {"mean", "sum", "group_dro"})
    if unknown and rule != "none":
        raise RecipeError(
            f"objective.reduction {unknown[0]!r}: nobody knows how it depends on the batch size. "
            f"Expected mean, sum or group_dro. Use --rule none, and set the rate by hand."
        )
    if "sum" in names and len(names) > 1:
        raise RecipeError(
            f"the terms of objective.reduction are {', '.join(sorted(names))}. One is summed, and "
            f"would outgrow the others in a larger batch. Sum all of them or none."
        )
    return names == {"sum"}
