"""What a recipe states: a section a class, a key a field.

    [model] [data] [objective] [optimizer] [schedule] [batch] [run]

Names are those of the zoo and of `anybatch.data`, or `package.module:function` of the user's.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "BatchSection",
    "DataSection",
    "ModelSection",
    "ObjectiveSection",
    "OptimizerSection",
    "PenaltySection",
    "Recipe",
    "RunSection",
    "ScheduleSection",
]

Positive = Field(gt=0)


class Section(BaseModel):
    """No key is accepted that is not declared, and no type is guessed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """What yields the outputs."""

    name: str
    args: dict[str, Any] = {}


class DataSection(Section):
    """Where examples come from, and which are held out."""

    name: str
    args: dict[str, Any] = {}
    held_out: float = Field(0.2, gt=0, lt=1)  # fraction of the examples
    stratify: bool = True  # the same fraction of each class
    split: int = Field(0, ge=0)  # which keyed split


class PenaltySection(Section):
    """One penalty."""

    kind: Literal["L1", "L2"]
    strength: float = Field(ge=0)
    on: list[str] | None = None  # patterns of parameter names; default: all but biases and norms
    name: str | None = None


class ObjectiveSection(Section):
    """What is minimised."""

    loss: str
    reduction: str | dict[str, Any] = "mean"  # a name, {name, scale, ...}, or one of these a term
    penalty: list[PenaltySection] = []
    grain: int | None = Field(None, ge=1)  # examples


class OptimizerSection(Section):
    """What turns a gradient into an update."""

    name: Literal["sgd", "adagrad", "rmsprop", "adam", "adamw"]
    lr: float = Positive
    args: dict[str, Any] = {}  # further arguments of torch.optim, such as momentum
    clip_norm: float | None = Field(None, gt=0)


class ScheduleSection(Section):
    """The learning rate over the examples used so far."""

    name: Literal["constant", "step"] = "constant"
    factor: float = Field(0.1, gt=0)  # of each drop
    every: int | None = Field(None, ge=1)  # examples between drops
    at: list[int] | None = None  # examples at which it drops
    warm_up: int = Field(0, ge=0)  # examples over which the rate rises from warm_up_start
    warm_up_start: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _no_key_is_idle(self) -> Self:
        """Refuse what would change nothing: whoever wrote it expects that it does."""
        drops = self.every is not None or self.at is not None
        if self.name == "constant" and (drops or self.factor != 0.1):
            raise ValueError(
                "'constant' never drops: expected name = 'step', or no every, at, factor."
            )
        if self.name == "step" and (self.every is None) == (not self.at):
            raise ValueError("'step' expects either every = examples or at = [examples, ...].")
        if self.warm_up_start and not self.warm_up:
            raise ValueError("warm_up_start expects warm_up = examples above 0.")
        return self


class BatchSection(Section):
    """Which examples make up an update, and how many pass through the model at a time."""

    size: int = Field(ge=1)  # examples
    last: Literal["keep", "carry", "drop"] = "keep"
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None  # examples


class RunSection(Section):
    """How long, from which seed, on what."""

    epochs: int = Field(ge=1)
    seed: int = Field(0, ge=0)
    dtype: Literal["float32", "float64"] = "float32"
    device: str = "cpu"
    threads: int | None = Field(None, ge=1)  # None: torch's choice
    checkpoint_every: int | None = Field(None, ge=1)  # updates; None: each epoch
    keep: int = Field(2, ge=2)  # checkpoints


class Recipe(Section):
    """Everything that a run depends on."""

    model: ModelSection
    data: DataSection
    objective: ObjectiveSection
    optimizer: OptimizerSection
    schedule: ScheduleSection = ScheduleSection()
    batch: BatchSection
    run: RunSection
