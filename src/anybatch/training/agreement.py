"""What ranks hold, compared: all of it must be the same bits on each.

    d_r = digest(state of rank r);    d_0 = d_1 = ... or the first tensor that differs is named

One digest a rank travels. Only where they differ do those of every tensor follow, so that the
message names what has parted, after which update, and which rank stands alone. Gradients are sums
over all ranks, so that a fault stays in the tensor where it was made.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from anybatch import distributed
from anybatch.compiled import unwrap
from anybatch.distributed import LostRankError, ProcessGroup, fsdp
from anybatch.errors import RunError
from anybatch.training.digest import digest
from anybatch.training.state import TrainingState
from anybatch.training.surroundings import common_generators, digests_of

__all__ = ["Agreement", "HasLeftError"]

T = TypeVar("T")
Path = tuple[str | int, ...]
_HERE = -1  # less than what ranks say of themselves elsewhere: 0 that all is well, 1 an error


class HasLeftError(LostRankError):
    """Another rank has left its loop, and this one after it."""


@dataclass
class Agreement:
    """Compares what ranks hold, and knows until when it was the same.

    Reading a state takes its SHA-256: about a second for 1.5 GB, once a comparison.

    Raises:
        RunError: `every` that is no count.
    """

    training: TrainingState
    group: ProcessGroup | None
    every: int | None = None  # updates between comparisons; None: before checkpoints alone
    bitwise: bool = False
    until: int = field(default=0, init=False)  # after so many updates all held the same
    _generators: dict[str, str] = field(default_factory=dict, init=False)  # digests at the start
    _has_left: bool = field(default=False, init=False)  # another rank, as `check` has heard

    def __post_init__(self) -> None:
        if self.every is not None and (type(self.every) is not int or self.every < 1):
            raise RunError(
                f"expected compare_every to be an integer of at least 1, got {self.every!r}: "
                f"updates, or None for before each checkpoint alone."
            )

    def begin(self) -> None:
        """Note where the loop begins."""
        self.until = self.training.num_updates
        if self.group is not None:
            self._generators = digests_of(self.training.generators())

    def is_due(self) -> bool:
        """Whether to compare now, after an update, beside what checkpoints ask for."""
        return self.every is not None and self.training.num_updates % self.every == 0

    def check(self, saved: int | None) -> dict[str, Any]:
        """See that all ranks hold the same bits; to be called on every rank.

        What only one rank holds, such as its slices of a model in shards, is nobody's to compare.

        Args:
            saved: updates made until the newest checkpoint; None: there is none.

        Returns:
            What they hold, as `TrainingState.dump` gives it; of a model in shards the first rank
            has all, and the others what each has all of.

        Raises:
            RunError: naming the first tensor that differs, and on which ranks, the same on all.
        """
        if self.group is None:
            return self.training.dump()
        self._meet()
        state = distributed.call_together(self.training.dump, self.group)
        shared = fsdp.drop_shards({k: v for k, v in state.items() if k != "generators"})
        told = distributed.all_gather_object(lambda: digest(shared), self.group)
        if len(set(told)) > 1:
            held = distributed.all_gather_object(lambda: dict(_parts(shared)), self.group)
            raise RunError(self._explain(held, saved))
        self.until = self.training.num_updates
        state["generators"] = common_generators(
            state["generators"], self._generators, self.group, bitwise=self.bitwise
        )
        return distributed.call_together(lambda: fsdp.gather_state(state, self.group), self.group)

    def handed(self, step: T) -> Iterator[T]:
        """Give the loop's body its step.

        Raises:
            HasLeftError: the body ends because another rank has left: all know, and nothing is left
                to agree upon.
        """
        try:
            yield step
        except GeneratorExit:
            if self._has_left:
                raise HasLeftError from None
            raise

    def _meet(self) -> None:
        """Go on if every rank has come here; one that has left its loop's body tells it."""
        heard = distributed.all_reduce_max(_HERE, self.group)
        if heard > 0:
            self._has_left = True
            distributed.all_gather_object(lambda: None, self.group)  # raises what the other tells
        if heard != _HERE:
            raise RunError(
                "step.save() was called on some ranks and not on others, expected it on all: what "
                "they hold is compared before it is written. Call it on what is equal on all, such "
                "as step.step."
            )

    def _explain(self, held: Sequence[dict[Path, str]], saved: int | None) -> str:
        parted = [path for path in _all_of(held) if len({one.get(path) for one in held}) > 1]
        now = self.training.num_updates
        kept = "Nothing has been checkpointed yet: mend the cause and begin again."
        if saved is not None:
            kept = (
                f"Nothing has been checkpointed since {saved} updates: mend the cause, and resume "
                f"from there."
            )
        return (
            f"after {now} updates the ranks have parted at {self._name(parted[0])}, the first of "
            f"{len(parted)}: {_who([one.get(parted[0]) for one in held])}, expected the same bits "
            f"on all, as after {self.until}. Probably a hardware fault where one stands alone, "
            f"machines of different kinds, or what a rank does by itself in the body of the loop, "
            f"such as to draw random numbers without a key. {kept}"
        )

    def _name(self, path: Path) -> str:
        """Such as "optimizer.state.0.weight.exp_avg": parameters by their names."""
        named = {id(p): name for name, p in unwrap(self.training.model).named_parameters()}
        groups = self.training.optimizer.param_groups
        names = [named.get(id(p), "?") for group in groups for p in group["params"]]
        if path[:2] == ("optimizer", "state") and len(path) > 2 and isinstance(path[2], int):
            path = (*path[:2], names[path[2]], *path[3:])
        steps = [f".{key}" if isinstance(key, str) else f"[{key}]" for key in path]
        return "".join(steps).removeprefix(".") or "state"


def _parts(node: Any, path: Path = ()) -> Iterator[tuple[Path, str]]:
    """The digest of each leaf by its path, and of each container without its content."""
    if isinstance(node, dict):
        yield path, digest(dict.fromkeys(node))
        children = list(node.items())
    elif isinstance(node, list | tuple):
        yield path, digest(type(node)([None] * len(node)))
        children = list(enumerate(node))
    else:
        yield path, digest(node)
        return
    for key, child in children:
        yield from _parts(child, (*path, key))


def _all_of(held: Sequence[dict[Path, str]]) -> list[Path]:
    """The paths of all ranks, in the order of the first."""
    return list(dict.fromkeys(path for one in held for path in one))


def _who(found: Sequence[str | None]) -> str:
    """Which ranks hold what, those that most hold first; a majority is named."""
    ranks: dict[str | None, list[int]] = {}
    for rank, one in enumerate(found):
        ranks.setdefault(one, []).append(rank)
    holders = sorted(ranks.items(), key=lambda item: -len(item[1]))
    said = [f"{_ranks(who)} {_holds(what, len(who))}" for what, who in holders]
    if 2 * len(holders[0][1]) > len(found):
        return f"most, {said[0]}, and {', '.join(said[1:])}"
    return f"{' and '.join(said)}, none of them most"


def _ranks(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    return f"ranks {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


def _holds(what: str | None, number: int) -> str:
    verb = "has" if number == 1 else "have"
    return f"{verb} none" if what is None else f"{verb} {what[:12]}"
