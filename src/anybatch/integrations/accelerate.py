"""Compute the exact gradient in a loop with Accelerate.

    gradient = backward(accelerator, model, objective, [batch, batch, ...])
    accelerator.clip_grad_norm_(model.parameters(), 1.0);  optimizer.step();  optimizer.zero_grad()

It takes the place of `accelerator.accumulate` and `accelerator.backward` for the micro-batches of
one update. Each keeps its own padding, and is a grain if the model draws random numbers. Loss
scale, mixed precision and ranks are the accelerator's.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from anybatch.distributed import get_world
from anybatch.errors import ModelError
from anybatch.gradient import Gradient, batch_gradient
from anybatch.layout import Layout
from anybatch.ledger import Observe
from anybatch.objective import Objective
from anybatch.precision import Precision
from anybatch.pytree import MicroBatches
from anybatch.randomness import Key

__all__ = ["backward", "find_precision", "use_bare_forward"]


def backward(
    accelerator: Any,
    model: nn.Module,
    objective: Objective,
    batches: Sequence[Any],
    *,
    key: Key | None = None,
    layout: Layout | None = None,
    observe: Observe | None = None,
) -> Gradient:
    """Leave the gradient of one update in `.grad`, over all micro-batches and all processes.

    Args:
        accelerator: `accelerate.Accelerator`, with DDP or a single process.
        model: as `accelerator.prepare` has returned it.
        objective: example losses of the bare model, reduction and penalty.
        batches: this process's micro-batches of the update; may differ in number and size from
            process to process.
        key: origin of the model's random numbers, alike on all processes: `ab.Key(seed, step)`.
        layout, observe: see `batch_gradient`.

    Returns:
        The gradient; `gradient.loss` is that of the whole batch on every process.

    Raises:
        ModelError: DeepSpeed, FSDP or another way to shard the model. And all errors of
            `batch_gradient`.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> accelerator = Accelerator(cpu=True)
        >>> model = accelerator.prepare(nn.Linear(2, 1))
        >>> objective = Objective(lambda model, x: model(x)[:, 0] ** 2)
        >>> batches = [torch.ones(3, 2), torch.ones(1, 2)]
        >>> backward(accelerator, model, objective, batches).num_examples
        4
    """
    kind = str(accelerator.distributed_type).removeprefix("DistributedType.")
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise ModelError(
            f"The accelerator uses {kind}. backward supports a single process and DDP. For a model "
            f"that is sharded, call fully_shard(model) and ab.batch_gradient(group=...) without it."
        )
    with use_bare_forward(accelerator.unwrap_model(model)) as bare:
        return batch_gradient(
            bare,
            objective,
            MicroBatches(list(batches)),
            key=key,
            layout=layout,
            observe=observe,
            group=get_world(accelerator.num_processes),
            precision=find_precision(accelerator),
            scaler=accelerator.scaler,
        )


@contextmanager
def use_bare_forward(model: nn.Module) -> Iterator[nn.Module]:
    """Use the model's own `forward`: Accelerate wraps it in autocast, which an update has too."""
    wrapped = model.__dict__.get("forward")
    if wrapped is None or "_original_forward" not in model.__dict__:
        yield model
        return
    model.__dict__["forward"] = model.__dict__["_original_forward"]
    try:
        yield model
    finally:
        model.__dict__["forward"] = wrapped


def find_precision(accelerator: Any) -> Precision:
    """Return the precision of an accelerator's forward passes."""
    names: dict[str, Precision] = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
    if accelerator.mixed_precision not in names:
        raise ModelError(
            f"mixed_precision is {accelerator.mixed_precision!r}. It must be one of "
            f"{', '.join(map(repr, names))}."
        )
    return names[accelerator.mixed_precision]
