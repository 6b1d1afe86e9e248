"""What a recipe states: a section a class, a key a field.

    [model] [data] [objective] [optimizer] [schedule] [average] [observe] [batch] [order] [run]
    [stop] [track]

Names are those of the zoo and of `anybatch.data`, or `package.module:function` of the user's.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "USED_BY",
    "AverageSection",
    "BatchSection",
    "DataSection",
    "GroupSection",
    "ModelSection",
    "ObjectiveSection",
    "ObserveSection",
    "OptimizerSection",
    "OrderSection",
    "PenaltySection",
    "Recipe",
    "RunSection",
    "ScheduleSection",
    "StopSection",
    "TrackSection",
]

Positive = Field(gt=0)

USED_BY = {
    "constant": (),
    "step": ("factor", "every", "at"),
    "inverse": ("gamma", "power", "every"),
    "exponential": ("factor", "every", "staircase"),
    "cosine": ("examples", "end"),
}
"""The keys of [schedule] that each schedule uses, beside those of the warm-up."""


class Section(BaseModel):
    """No key is accepted that is not declared, and no type is guessed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """What yields the outputs."""

    name: str
    args: dict[str, Any] = {}
    weights: str | None = None  # a safetensors file, or a folder with one, to start from


class DataSection(Section):
    """Where examples come from, and which are held out."""

    name: str
    args: dict[str, Any] = {}
    held_out: Annotated[float, Field(gt=0, lt=1)] | dict[str, Any] = 0.2  # fraction, or its args
    validation: float = Field(0.0, ge=0, lt=1)  # fraction of the examples
    stratify: bool = True  # the same fraction of each class
    split: int = Field(0, ge=0)  # which keyed split
    workers: int = Field(0, ge=0)  # processes that read batches ahead; 0: none


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


class GroupSection(Section):
    """Parameters with arguments of their own: any further key is one of the optimiser's."""

    model_config = ConfigDict(extra="allow")

    on: list[str]  # patterns of parameter names
    lr_factor: float = Field(1.0, ge=0)  # times the rate of the others


class OptimizerSection(Section):
    """What turns a gradient into an update."""

    name: str
    lr: float = Positive
    args: dict[str, Any] = {}  # further arguments of torch.optim, such as momentum
    groups: list[GroupSection] = []  # the first that matches holds a parameter
    clip_norm: float | None = Field(None, gt=0)  # of the whole gradient
    clip_examples: float | None = Field(None, gt=0)  # of each example's

    @model_validator(mode="after")
    def _is_clipped_once(self) -> Self:
        if None not in (self.clip_norm, self.clip_examples):
            raise ValueError("clip_norm and clip_examples: expected one of them.")
        return self


class ScheduleSection(Section):
    """The learning rate over the examples used so far."""

    name: Literal["constant", "step", "inverse", "exponential", "cosine"] = "constant"
    factor: float = Field(0.1, gt=0)  # of each drop, or over each `every`
    every: int | None = Field(None, ge=1)  # examples between drops, or of one iteration
    at: list[int] | None = None  # examples at which it drops
    gamma: float | None = Field(None, ge=0)  # an iteration
    power: float | None = Field(None, ge=0)
    staircase: bool = False  # falls at the end of each `every` examples
    examples: int | None = Field(None, ge=1)  # over which the rate falls to `end`
    end: float = Field(0.0, ge=0)
    warm_up: int = Field(0, ge=0)  # examples over which the rate rises from warm_up_start
    warm_up_start: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _no_key_is_idle(self) -> Self:
        """Refuse what would change nothing: whoever wrote it expects that it does."""
        used = USED_BY[self.name]
        fields = type(self).model_fields
        changed = [key for key, field in fields.items() if getattr(self, key) != field.default]
        for key in changed:
            users = [name for name, keys in USED_BY.items() if key in keys]
            if users and self.name not in users:
                raise ValueError(
                    f"{self.name!r} does not use {key}: expected name = "
                    f"{' or '.join(map(repr, users))}, or no {key}."
                )
        if self.name == "step" and (self.every is None) == (not self.at):
            raise ValueError("'step' expects either every = examples or at = [examples, ...].")
        missing = [key for key in used if getattr(self, key) is None]
        if self.name != "step" and missing:
            raise ValueError(f"{self.name!r} expects {', '.join(missing)} too.")
        if self.warm_up_start and not self.warm_up:
            raise ValueError("warm_up_start expects warm_up = examples above 0.")
        return self


class AverageSection(Section):
    """A moving average of the weights, to be evaluated in their stead."""

    decay: float | None = Field(None, ge=0, lt=1)  # None: no average
    warm_up: bool = False  # a lower decay at first

    @model_validator(mode="after")
    def _no_key_is_idle(self) -> Self:
        if self.warm_up and self.decay is None:
            raise ValueError("warm_up expects decay, such as 0.999.")
        return self


class BatchSection(Section):
    """Which examples make up an update, and how many pass through the model at a time."""

    size: int = Field(ge=1)  # examples
    last: Literal["keep", "carry", "drop"] = "keep"
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None  # examples
    reference_size: int | None = Field(None, ge=1)  # that the other numbers belong to; None: size
    scaling: Literal["auto", "linear", "sqrt", "half-life", "none", "adascale"] = "auto"

    @model_validator(mode="after")
    def _no_key_is_idle(self) -> Self:
        if self.scaling != "auto" and self.reference_size is None:
            raise ValueError("scaling expects reference_size = the examples it carries from.")
        return self


class ObserveSection(Section):
    """Which per-example quantities of each update are kept with the run."""

    norms: bool = False
    alignment: bool = False
    share: bool = False


class OrderSection(Section):
    """In which order examples are visited."""

    name: str = "shuffled"
    args: dict[str, Any] = {}


class RunSection(Section):
    """How long, from which seed, on what."""

    epochs: int = Field(ge=1)
    seed: int = Field(0, ge=0)
    dtype: Literal["float32", "float64"] = "float32"  # of weights and data
    precision: Literal["float32", "bfloat16", "float16"] = "float32"  # narrower: by autocast
    device: str = "cpu"
    threads: int | None = Field(None, ge=1)  # of each rank; None: torch's choice
    kernels: Literal["torch", "fastest"] = "torch"  # "fastest": measured on this machine
    shard: bool = False  # the optimiser's state in parts on the ranks
    bitwise: bool = False  # the same bits for any number of ranks and through any resume
    self_check: bool = True  # compare a few examples, cut and uncut, now and then
    checkpoint_every: int | None = Field(None, ge=1)  # updates; None: each epoch
    keep: int = Field(2, ge=2)  # checkpoints
    compare_every: int | None = Field(None, ge=1)  # updates; None: before each checkpoint alone

    @model_validator(mode="after")
    def _says_what_bits_depend_on(self) -> Self:
        if self.bitwise and self.threads is None and self.device == "cpu":
            raise ValueError("bitwise expects threads = a number, such as 1: bits depend on it.")
        return self


class StopSection(Section):
    """When to stop before the last epoch, by a value on the validation data, or, where there are
    none, on the held-out data."""

    metric: str | None = None  # "loss" (of the data, without penalty), or a metric; None: never
    better: Literal["lower", "higher"] | None = None  # None: lower for the loss, else higher
    target: float | None = None  # stop once it is reached
    patience: int | None = Field(None, ge=1)  # stop after so many epochs without a better value

    @model_validator(mode="after")
    def _no_key_is_idle(self) -> Self:
        rules = (self.target, self.patience)
        if self.metric is None and (self.better, *rules) != (None, None, None):
            raise ValueError("target and patience expect metric = 'loss', or that of a metric.")
        if self.metric is not None and rules == (None, None):
            raise ValueError("metric expects target = value, patience = epochs, or both.")
        return self


class TrackSection(Section):
    """Where else figures go, beside the run's own records."""

    to: list[Literal["tensorboard", "mlflow", "wandb"]] = []
    smoothing: float = Field(0.9, ge=0, lt=1)  # of the moving averages of the losses


class Recipe(Section):
    """Everything that a run depends on."""

    model: ModelSection
    data: DataSection
    objective: ObjectiveSection
    optimizer: OptimizerSection
    schedule: ScheduleSection = ScheduleSection()
    average: AverageSection = AverageSection()
    observe: ObserveSection = ObserveSection()
    batch: BatchSection
    order: OrderSection = OrderSection()
    run: RunSection
    stop: StopSection = StopSection()
    track: TrackSection = TrackSection()
