"""Schema of a recipe: one class for each section, one field for each key.

    [model] [data] [objective] [optimizer] [schedule] [average] [observe] [spikes] [batch] [order]
    [run] [stop] [track]

A name is one of the zoo or of `anybatch.data`, or code of the user: `package.module:function`.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from anybatch.displays import make_table

__all__ = [
    "SCHEDULE_KEYS",
    "BatchSection",
    "DataSection",
    "ModelSection",
    "ObjectiveSection",
    "ObserveSection",
    "OptimizerSection",
    "OrderSection",
    "Recipe",
    "RunSection",
    "ScheduleSection",
    "Section",
    "SpikesSection",
    "StopSection",
]

SCHEDULE_KEYS = {
    "constant": (),
    "step": ("factor", "every", "at"),
    "inverse": ("gamma", "power", "every"),
    "exponential": ("factor", "every", "staircase"),
    "cosine": ("examples", "end"),
}
"""Keys of [schedule] that each schedule uses. All of them can warm up."""


class Section(BaseModel):
    """Base of all sections. It accepts only declared keys and converts no types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """Model that yields the outputs."""

    name: str
    args: dict[str, Any] = {}
    weights: str | None = None  # initial weights: a safetensors file, or a folder with one


class DataSection(Section):
    """Source of the examples, and their splits."""

    name: str
    args: dict[str, Any] = {}
    held_out: Annotated[float, Field(gt=0, lt=1)] | dict[str, Any] = 0.2  # fraction, or its args
    validation: float = Field(0.0, ge=0, lt=1)  # fraction of the examples
    stratify: bool = True  # the same fraction of each class
    split: int = Field(0, ge=0)  # seed of the split
    workers: int = Field(0, ge=0)  # processes that read batches ahead


class PenaltySection(Section):
    """Penalty on the weights."""

    kind: Literal["L1", "L2"]
    strength: float = Field(ge=0)
    on: list[str] | None = None  # patterns of parameter names; default: all but biases and norms
    name: str | None = None


class ObjectiveSection(Section):
    """Objective that training minimises."""

    loss: str
    reduction: str | dict[str, Any] = "mean"  # a name, {name, scale, ...}, or one for each term
    penalty: list[PenaltySection] = []
    grain: int | None = Field(None, ge=1)  # examples


class GroupSection(Section):
    """Parameters with their own optimiser arguments. Any other key is such an argument."""

    model_config = ConfigDict(extra="allow")

    on: list[str]  # patterns of parameter names
    lr_factor: float = Field(1.0, ge=0)  # times optimizer.lr


class OptimizerSection(Section):
    """Optimiser that turns a gradient into an update."""

    name: str
    lr: float = Field(gt=0)
    args: dict[str, Any] = {}  # further arguments of torch.optim, such as momentum
    groups: list[GroupSection] = []  # a parameter belongs to the first group that matches
    clip_norm: float | None = Field(None, gt=0)  # of the whole gradient
    clip_examples: float | None = Field(None, gt=0)  # of each example's

    @model_validator(mode="after")
    def _check_clip(self) -> Self:
        if None not in (self.clip_norm, self.clip_examples):
            raise ValueError("clip_norm and clip_examples cannot both be set. Leave one out.")
        return self


class ScheduleSection(Section):
    """Learning rate as a function of the examples used so far."""

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
    def _check_keys(self) -> Self:
        """Refuse keys that would change nothing: whoever wrote them expects that they do."""
        for key, field in type(self).model_fields.items():
            users = [name for name, keys in SCHEDULE_KEYS.items() if key in keys]
            if users and self.name not in users and getattr(self, key) != field.default:
                raise ValueError(
                    f"{self.name!r} does not use {key}. Set name = "
                    f"{' or '.join(map(repr, users))}, or leave out {key}."
                )
        if self.name == "step":
            if (self.every is None) == (not self.at):
                raise ValueError("'step' needs either every = examples or at = [examples, ...].")
        elif missing := [key for key in SCHEDULE_KEYS[self.name] if getattr(self, key) is None]:
            raise ValueError(f"{self.name!r} needs {', '.join(missing)} too.")
        if self.warm_up_start and not self.warm_up:
            raise ValueError("warm_up_start needs warm_up = examples, above 0.")
        return self


class AverageSection(Section):
    """Moving average of the weights. If there is one, it is what is evaluated."""

    decay: float | None = Field(None, ge=0, lt=1)  # None: no average
    warm_up: bool = False  # a lower decay at first

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        if self.warm_up and self.decay is None:
            raise ValueError("warm_up needs decay, such as 0.999.")
        return self


class BatchSection(Section):
    """Number of examples in an update and in a micro-batch."""

    size: int = Field(ge=1)  # examples
    last: Literal["keep", "carry", "drop"] = "keep"
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None  # examples
    reference_size: int | None = Field(None, ge=1)  # size that the other keys are stated for
    scaling: Literal["auto", "linear", "sqrt", "half-life", "none", "adascale"] = "auto"

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        if self.scaling != "auto" and self.reference_size is None:
            raise ValueError("scaling needs reference_size = the batch size that it starts from.")
        return self


class ObserveSection(Section):
    """Quantities of each example that the run records."""

    norms: bool = False
    alignment: bool = False
    share: bool = False
    projections: int = Field(0, ge=0)  # numbers that each gradient is projected to; 0: none


class SpikesSection(Section):
    """Watch for spikes of the loss and of the gradient's norm."""

    window: int | None = Field(None, ge=20)  # earlier updates to compare with; None: no watch
    factor: float = Field(4.0, gt=0)  # deviations above the median

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        if self.factor != 4.0 and self.window is None:
            raise ValueError("factor needs window = a number of updates, such as 100.")
        return self


class OrderSection(Section):
    """Order of the examples."""

    name: str = "shuffled"
    args: dict[str, Any] = {}


class RunSection(Section):
    """Length, seed, precision and device of training."""

    epochs: int = Field(ge=1)
    seed: int = Field(0, ge=0)
    dtype: Literal["float32", "float64"] = "float32"  # of weights and data
    precision: Literal["float32", "bfloat16", "float16"] = "float32"  # narrower: by autocast
    device: str = "cpu"
    threads: int | None = Field(None, ge=1)  # of each rank; None: torch's choice
    kernels: Literal["torch", "fastest"] = "torch"  # "fastest": measured on this machine
    shard: bool = False  # each rank holds a shard of the optimiser's state
    bitwise: bool = False  # the same bits for any number of ranks, and after any resume
    compile: bool | Literal["auto"] = False  # whole updates by torch.compile; "auto": if faster
    self_check: bool = True  # compare gradients of a few examples, cut and uncut, now and then
    checkpoint_every: int | None = Field(None, ge=1)  # updates; None: each epoch
    keep: int = Field(2, ge=2)  # checkpoints
    compare_every: int | None = Field(None, ge=1)  # updates; None: at each checkpoint

    @model_validator(mode="after")
    def _check_bitwise(self) -> Self:
        if self.bitwise and self.threads is None and self.device == "cpu":
            raise ValueError("bitwise needs threads = a number, such as 1. The bits depend on it.")
        if self.bitwise and self.compile:
            raise ValueError("bitwise and compile cannot both be set. Compiled bits differ.")
        return self


class StopSection(Section):
    """Early stopping by a value on the validation data, or on the held-out data without those."""

    metric: str | None = None  # "loss" of the data, or a metric; None: no stopping
    better: Literal["lower", "higher"] | None = None  # None: lower for the loss, else higher
    target: float | None = None  # stop at this value
    patience: int | None = Field(None, ge=1)  # stop after so many epochs without a better one

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        rules = (self.target, self.patience)
        if self.metric is None and (self.better, *rules) != (None, None, None):
            raise ValueError("target and patience need metric = 'loss', or the name of a metric.")
        if self.metric is not None and rules == (None, None):
            raise ValueError("metric needs target = value, patience = epochs, or both.")
        return self


class TrackSection(Section):
    """Trackers that receive figures in addition to the run's own records."""

    to: list[Literal["tensorboard", "mlflow", "wandb"]] = []
    smoothing: float = Field(0.9, ge=0, lt=1)  # of the moving averages of the losses


class Recipe(Section):
    """Everything that a run depends on.

    Example:
        >>> from anybatch.recipe.files import find_recipe, read_recipe
        >>> recipe = read_recipe(find_recipe("lenet-digits"), ["run.epochs=2"])
        >>> recipe.model.name, recipe.run.epochs
        ('lenet', 2)
    """

    model: ModelSection
    data: DataSection
    objective: ObjectiveSection
    optimizer: OptimizerSection
    schedule: ScheduleSection = ScheduleSection()
    average: AverageSection = AverageSection()
    observe: ObserveSection = ObserveSection()
    spikes: SpikesSection = SpikesSection()
    batch: BatchSection
    order: OrderSection = OrderSection()
    run: RunSection
    stop: StopSection = StopSection()
    track: TrackSection = TrackSection()

    def _repr_html_(self) -> str:
        """Show each key that the recipe states as a table in a notebook."""
        stated = self.model_dump(exclude_defaults=True)
        rows = [
            (f"{section}.{key}", value if isinstance(value, str) else repr(value))
            for section, keys in stated.items()
            for key, value in keys.items()
        ]
        return make_table("Recipe; all other keys have their defaults", ("key", "value"), rows)
