"""Check that all ranks hold the same bits.

    d_r = digest(state of rank r);    d_0 = d_1 = ..., or the first tensor that differs is named

Each rank sends one digest. Only if they differ do the digests of all tensors follow, so that the
message names the tensor, the update and the rank. Gradients are sums over all ranks, so a fault
stays in the tensor where it happened.

Global generators belong to the loop's body (see `state`). A checkpoint holds a generator only if it
has the same state on all ranks. It holds nothing of a single rank, since the number of ranks may
change on resume.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from anybatch import distributed
from anybatch.compiled import unwrap
from anybatch.distributed import LostRankError, ProcessGroup, fsdp
from anybatch.errors import RunError
from anybatch.runs.digest import digest
from anybatch.runs.state import TrainingState, find_device, read_generators

__all__ = ["OtherRankLeftError", "RankCheck"]

_log = logging.getLogger(__name__)

T = TypeVar("T")
Path = tuple[str | int, ...]
_IS_HERE = -1  # below what a rank sends from another place: 0 without an error, 1 with one


class OtherRankLeftError(LostRankError):
    """Another rank has left its loop, so this one leaves too."""


@dataclass
class RankCheck:
    """Compares the states of all ranks, and remembers until when they were equal.

    It computes the SHA-256 of the state: about a second for 1.5 GB.

    Raises:
        RunError: `every` is no count.
    """

    training: TrainingState
    group: ProcessGroup | None
    every: int | None = None  # updates between comparisons; None: only before checkpoints
    bitwise: bool = False
    equal_until: int = field(default=0, init=False)  # number of updates
    _first_generators: dict[str, str] = field(default_factory=dict, init=False)  # digests
    _other_left: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.every is not None and (type(self.every) is not int or self.every < 1):
            raise RunError(
                f"compare_every is {self.every!r}. It must be a number of updates of at least 1, "
                f"or None to compare only before each checkpoint."
            )

    def begin(self) -> None:
        """Record the state in which the loop begins."""
        self.equal_until = self.training.num_updates
        if self.group is not None:
            device = find_device(self.training.model)
            self._first_generators = _digest_each(read_generators(device))

    def is_due(self) -> bool:
        """Return whether to compare after this update, even without a checkpoint."""
        return self.every is not None and self.training.num_updates % self.every == 0

    def check(self, saved: int | None) -> dict[str, Any]:
        """Check that all ranks hold the same bits; to be called on every rank.

        What only one rank holds, such as its slices of a sharded model, is not compared.

        Args:
            saved: updates until the newest checkpoint; None: there is none.

        Returns:
            The state, as `TrainingState.dump` returns it. For a sharded model the first rank gets
            everything, and the others only what every rank has.

        Raises:
            RunError: the message names the first tensor that differs, and on which ranks. It is the
                same on all ranks.
        """
        if self.group is None:
            return self.training.dump()
        self._wait_for_all()
        state = distributed.call_together(self.training.dump, self.group)
        shared = fsdp.drop_shards(
            {k: v for k, v in state.items() if k not in ("generators", "watch")}
        )
        digests = distributed.all_gather_object(lambda: digest(shared), self.group)
        if len(set(digests)) > 1:
            leaves = distributed.all_gather_object(lambda: dict(_digest_leaves(shared)), self.group)
            raise RunError(self._explain(leaves, saved))
        self.equal_until = self.training.num_updates
        state["generators"] = _select_common_generators(
            state["generators"], self._first_generators, self.group, bitwise=self.bitwise
        )
        return distributed.call_together(lambda: fsdp.gather_state(state, self.group), self.group)

    def pass_to_body(self, step: T) -> Iterator[T]:
        """Yield the step to the body of the loop.

        Raises:
            OtherRankLeftError: the body ends because another rank has left. All ranks know it,
                and nothing is left to agree on.
        """
        try:
            yield step
        except GeneratorExit:
            if self._other_left:
                raise OtherRankLeftError from None
            raise

    def _wait_for_all(self) -> None:
        """Wait for every rank to come here; one that has left its loop's body says so."""
        status = distributed.all_reduce_max(_IS_HERE, self.group)
        if status > 0:
            self._other_left = True
            distributed.all_gather_object(lambda: None, self.group)  # raises the other rank's error
        if status != _IS_HERE:
            raise RunError(
                "step.save() was called on some ranks and not on others. It compares all ranks "
                "before it writes, so it must be called on all. Call it on a condition that is "
                "equal on all ranks, such as one on step.step."
            )

    def _explain(self, per_rank: Sequence[dict[Path, str]], saved: int | None) -> str:
        paths = dict.fromkeys(path for leaves in per_rank for path in leaves)
        differing = [p for p in paths if len({leaves.get(p) for leaves in per_rank}) > 1]
        now = self.training.num_updates
        advice = "Nothing has been checkpointed yet: mend the cause and begin again."
        if saved is not None:
            advice = (
                f"Nothing has been checkpointed since {saved} updates: mend the cause, and resume "
                f"from there."
            )
        return (
            f"after {now} updates the ranks have diverged at {self._format_path(differing[0])}, "
            f"the first of {len(differing)}: "
            f"{_describe_ranks([leaves.get(differing[0]) for leaves in per_rank])}. All had the "
            f"same bits after {self.equal_until}. If one rank differs from the others, the cause "
            f"is probably a hardware fault. Otherwise look for machines of different kinds, or "
            f"work that only some ranks do in the body of the loop, such as drawing random "
            f"numbers without a key. {advice}"
        )

    def _format_path(self, path: Path) -> str:
        """Write a path such as "optimizer.state.0.weight.exp_avg", with names of parameters."""
        names = {id(p): name for name, p in unwrap(self.training.model).named_parameters()}
        parameters = [p for group in self.training.optimizer.param_groups for p in group["params"]]
        if path[:2] == ("optimizer", "state") and len(path) > 2 and isinstance(path[2], int):
            path = (*path[:2], names.get(id(parameters[path[2]]), "?"), *path[3:])
        keys = [f".{key}" if isinstance(key, str) else f"[{key}]" for key in path]
        return "".join(keys).removeprefix(".") or "state"


def _digest_leaves(node: Any, path: Path = ()) -> Iterator[tuple[Path, str]]:
    """Yield path and digest of each leaf, and of each container without its content."""
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
        yield from _digest_leaves(child, (*path, key))


def _describe_ranks(digests: Sequence[str | None]) -> str:
    """Say which ranks hold what, the largest group first; a majority is named."""
    ranks: dict[str | None, list[int]] = {}
    for rank, value in enumerate(digests):
        ranks.setdefault(value, []).append(rank)
    groups = sorted(ranks.items(), key=lambda item: -len(item[1]))
    clauses = [_describe_group(numbers, value) for value, numbers in groups]
    if 2 * len(groups[0][1]) > len(digests):
        return f"most, {clauses[0]}, and {', '.join(clauses[1:])}"
    return f"{' and '.join(clauses)}, none of them most"


def _describe_group(numbers: Sequence[int], value: str | None) -> str:
    if len(numbers) == 1:
        subject = f"rank {numbers[0]} has"
    else:
        subject = f"ranks {', '.join(map(str, numbers[:-1]))} and {numbers[-1]} have"
    return f"{subject} none" if value is None else f"{subject} {value[:12]}"


def _digest_each(state: Mapping[str, Any]) -> dict[str, str]:
    return {name: digest(value) for name, value in state.items()}


def _select_common_generators(
    state: Mapping[str, Any], first: Mapping[str, str], group: ProcessGroup, *, bitwise: bool
) -> dict[str, Any]:
    """Replace generators whose state differs between ranks by None; collective.

    Args:
        state: of the generators on this rank.
        first: digests when the loop began; a generator with another digest now was used.
        bitwise: whether a resumed run must make the same draws.
    """
    now = _digest_each(state)
    used = [name for name in now if now[name] != first.get(name)]
    per_rank = distributed.all_gather_object(lambda: (now, used), group)
    differing = [name for name in now if len({digests[name] for digests, _ in per_rank}) > 1]
    affected = sorted({name for _, names in per_rank for name in names if name in differing})
    if affected:
        text = (
            f"The loop's body draws from the generator of {' and '.join(affected)}, whose state "
            f"differs between ranks. No checkpoint holds the state of a single rank, so a resumed "
            f"run draws other numbers. Seed it alike on all ranks, or draw from a generator that "
            f"is seeded with the step: torch.Generator().manual_seed(step.step)."
        )
        if bitwise:
            raise RunError(text)
        if distributed.get_rank(group) == 0:
            _log.warning(text)
    return {name: None if name in differing else value for name, value in state.items()}
