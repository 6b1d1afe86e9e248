"""Everything that the computation of one update needs."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from anybatch.distributed import ProcessGroup
from anybatch.errors import LedgerError
from anybatch.example_losses import Losses
from anybatch.gradient.forward_writes import Writes
from anybatch.gradient.parameter_hooks import ParameterHooks
from anybatch.gradient.survey import Facts, Survey, grain_reason
from anybatch.layout import ShareRange
from anybatch.ledger import Ledger
from anybatch.ledger.noise import NoiseEstimate
from anybatch.ledger.observer import Pass
from anybatch.ledger.one_by_one import OneByOne
from anybatch.ledger.unplaced import UnplacedError
from anybatch.objective import Objective
from anybatch.precision import Precision
from anybatch.randomness import Key

__all__ = ["GrainNorms", "Observation", "PaddingPasses", "Update", "WatchedPass"]

WatchedPass = Pass | OneByOne


class PaddingPasses(NamedTuple):
    """Dummy passes for a rank with fewer micro-batches; FSDP needs equal pass counts."""

    share: Any  # a few examples, which add nothing to the gradient
    size: int
    num_passes: int


class Observation(Protocol):
    """The ledger's view of an update, see `observed`."""

    def begin(self, size: int) -> WatchedPass: ...
    def backward(
        self,
        watched: WatchedPass,
        losses: Losses,
        coefficients: Mapping[str, Tensor],
        scale: float,
    ) -> bool: ...
    def replan(self, error: UnplacedError) -> None: ...
    def ledger(self, sums: Mapping[str, Tensor], factor: float) -> Ledger: ...
    def noise(self) -> NoiseEstimate | None: ...


class GrainNorms:
    """Norms |G_g| of what each grain of a share adds to the gradient, in order.

        G = sum over grains g of G_g,    G_g = sum of c_i grad v_i over the examples of g

    They are all that is defined if examples couple. Each grain has its own backward pass, so G_g
    is what that pass leaves in `.grad`.
    """

    def __init__(self, survey: Survey) -> None:
        self._parameters = list(survey.parameters.values())
        self._norms: list[float] = []

    def append(self, scale: float) -> None:
        """Append the norm of what a backward pass has left in `.grad`, times a factor."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        wide = [g if g.dtype.itemsize >= 4 else g.float() for g in gradients]
        self._norms.append(abs(scale) * math.hypot(*map(float, torch._foreach_norm(wide))))

    def to_tensor(self, reason: str | None, factor: float) -> Tensor:
        """Return |G_g| [grains].

        Args:
            reason: why the model runs grain by grain; None: it does not.
            factor: G_g over the gradient that a backward pass leaves.

        Raises:
            LedgerError: a model without grains.
        """
        if reason is None:
            raise LedgerError(
                "The model neither couples examples nor draws random numbers, so it is not cut "
                "into grains, and has no grain norms. Observe norms, which are each example's."
            )
        return factor * torch.tensor(self._norms, dtype=torch.float64)


@dataclass(slots=True, kw_only=True)
class Update:
    """Everything that one update needs."""

    model: nn.Module
    survey: Survey  # of the model
    facts: Facts  # about the model under this objective
    device: torch.device  # of the parameters
    objective: Objective
    share: Any
    share_range: ShareRange
    key: Key | None  # origin of the draws of a grain; None: nothing may be drawn
    ids: Tensor | None
    reduction_states: Mapping[str, Tensor | None]
    group: ProcessGroup | None
    writes: Writes  # of the forward passes
    precision: Precision = "float32"
    loss_scale: float = 1.0
    observation: Observation | None = None  # of each example, if requested
    grain_norms: GrainNorms | None = None  # if requested
    padding: PaddingPasses | None = None  # only if the model is sharded
    is_bitwise: bool = False  # grain by grain, summed pairwise
    has_kernels: bool = False  # whether kernels are chosen by measurement
    scaler: GradScaler | None = None  # the caller's, which divides by its scale
    self_check: bool | Literal["run"] = True  # see `self_check`
    hooks: ParameterHooks | None = None  # the user's hooks on parameters

    @contextmanager
    def preserve_outside_gradients(self) -> Iterator[None]:
        """Leave `.grad` of the modules outside of the model unchanged."""
        outside = self.facts.list_outside()
        gradients = [(p, p.grad) for module in outside for p in module.parameters()]
        for p, _ in gradients:
            p.grad = None
        try:
            yield
        finally:
            for p, gradient in gradients:
                p.grad = gradient

    def find_grain_reason(self) -> str | None:
        """Return why the share is processed grain by grain; None: it need not be."""
        if self.is_bitwise:
            return "bitwise=True adds up grains in a fixed order"
        return grain_reason(self.survey, self.facts)
