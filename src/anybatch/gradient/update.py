"""All that one update needs to know."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from anybatch.distributed import ProcessGroup
from anybatch.example_losses import Losses
from anybatch.gradient.forward_writes import Writes
from anybatch.gradient.grain_norms import GrainNorms
from anybatch.gradient.parameter_hooks import ParameterHooks
from anybatch.gradient.survey import Facts, Survey, grain_reason
from anybatch.layout import ShareRange
from anybatch.ledger import Ledger
from anybatch.ledger.noise import NoiseEstimate
from anybatch.ledger.plain_autograd import OneByOne
from anybatch.ledger.unplaced import UnplacedError
from anybatch.ledger.watched_pass import WatchedPass
from anybatch.objective import Objective
from anybatch.precision import Precision
from anybatch.randomness import Key

__all__ = ["Idle", "Update", "Watching"]


class Idle(NamedTuple):
    """What a rank goes through while others, with more parts, need its part of the model."""

    share: Any  # a few examples, of which none counts
    size: int
    passes: int


class Watching(Protocol):
    """The ledger's view of an update, see `watch`."""

    def begin(self, size: int) -> WatchedPass | OneByOne: ...
    def backward(
        self,
        watched: WatchedPass | OneByOne,
        losses: Losses,
        coefficients: Mapping[str, Tensor],
        scale: float,
    ) -> bool: ...
    def replan(self, error: UnplacedError) -> None: ...
    def ledger(self, sums: Mapping[str, Tensor], factor: float) -> Ledger: ...
    def noise(self) -> NoiseEstimate | None: ...


@dataclass(slots=True, kw_only=True)
class Update:
    """All that one update needs."""

    model: nn.Module
    survey: Survey  # of the model
    facts: Facts  # of the model under this objective
    objective: Objective
    share: Any
    place: ShareRange
    key: Key | None  # where the draws of a grain come from; None: nothing may be drawn
    ids: Tensor | None
    states: Mapping[str, Tensor | None]  # of the reductions
    group: ProcessGroup | None
    writes: Writes  # of the forward passes
    precision: Precision = "float32"
    loss_scale: float = 1.0
    watch: Watching | None = None  # of the ledger, where one is asked for
    grain_norms: GrainNorms | None = None  # likewise
    idle: Idle | None = None  # only of a model in shards
    is_bitwise: bool = False  # grain by grain, added up in the order of `tree`
    scaler: GradScaler | None = None  # that of the caller, who will divide by its scale
    self_check: bool | Literal["run"] = True  # see `self_check`
    hooks: ParameterHooks | None = None  # the user's on parameters, where there are any
    device: torch.device = field(init=False)  # of the parameters

    def __post_init__(self) -> None:
        self.device = next(iter(self.survey.parameters.values())).device

    @property
    def is_first(self) -> bool:
        """Whether nothing is known yet of the model's random numbers."""
        return self.facts.draws is None and self.survey.layer is None

    @contextmanager
    def outside_gradients_kept(self) -> Iterator[None]:
        """Leave `.grad` of the modules outside of the model as it is."""
        modules = [module() for module in self.facts.outside.values()]
        kept = [(p, p.grad) for m in modules if m is not None for p in m.parameters()]
        for p, _ in kept:
            p.grad = None
        try:
            yield
        finally:
            for p, gradient in kept:
                p.grad = gradient

    def find_grain_reason(self) -> str | None:
        """Why the share is gone through grain by grain; None: it need not be."""
        if self.is_bitwise:
            return "bitwise=True adds up grains in a fixed order"
        return grain_reason(self.survey, self.facts)
