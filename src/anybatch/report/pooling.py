"""Max-pooling: which input won each window of an example, and which gradient it got.

    y[r, c] = max of x over window (r, c),    winner[r, c] = its place in the plane
    dv_i/dx[n] = sum of dv_i/dy[r, c] over the windows that n has won

One pass over the batch records the operation itself, so any layer may call it. The gradient is that
of each example's own loss v_i. The only sum over the batch is the number of examples in which an
input won.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from anybatch import pytree
from anybatch.gradient.buffers import Buffers
from anybatch.gradient.survey import find_grain_reason
from anybatch.layout import Layout, MicroBatch, ShareRange, cut_grains
from anybatch.precision import autocast
from anybatch.randomness import preserve_generators, seed_generators
from anybatch.report.evidence import Evidence
from anybatch.report.packing import narrow, pack
from anybatch.report.ties import find_ties

__all__ = ["PoolingCall", "describe_pooling"]

MAX_CHANNELS = 6  # of a layer: those with the largest gradients
MAX_BYTES = 600_000  # of a layer's maps in a page
_MAX_POOL = (F.max_pool2d, F.max_pool2d_with_indices, torch.max_pool2d)
_ARGUMENTS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


@dataclass(frozen=True, slots=True)
class PoolingCall:
    """One call of max-pooling for B examples."""

    layer: str  # the module that called it
    arguments: dict[str, Any]  # kernel_size, stride, ...
    x: Tensor  # [B, C, H, W]
    y: Tensor  # [B, C, h, w]
    winners: Tensor  # [B, C, h, w], places in the plane of H W inputs
    gradients: list[Tensor] = field(
        default_factory=list
    )  # dv_i/dy [B, C, h, w], after the backward pass

    def get_sizes(self, name: str) -> list[int]:
        """Return an argument as sizes [down, right]."""
        if name == "stride":
            return _to_pair(self.arguments.get(name) or self.arguments["kernel_size"])
        return _to_pair(self.arguments.get(name, {"padding": 0, "dilation": 1}.get(name)))

    def route_gradients(self) -> Tensor:
        """Return dv_i/dx through this layer: [B, C, H, W]."""
        planes = torch.zeros_like(self.x).flatten(2)
        planes.scatter_add_(2, self.winners.flatten(2), self.gradients[0].flatten(2).to(planes))
        return planes.view_as(self.x)

    def count_wins(self) -> Tensor:
        """Count the examples in which each input won a window: [C, H, W]."""
        planes = torch.zeros(self.x.shape, dtype=torch.uint8, device=self.x.device).flatten(2)
        return planes.scatter_(2, self.winners.flatten(2), 1).sum(0).view(self.x.shape[1:])


def describe_pooling(evidence: Evidence) -> dict[str, Any] | None:
    """Describe every max-pooling call, for as many examples as fit in the page.

    Returns:
        None if the model has no such layer over images, or is not known.
    """
    if evidence.model is None or evidence.objective is None:
        return None
    calls = _record_pooling(evidence)
    if not calls:
        return None
    return {"layers": [_describe_layer(call, evidence.ledger.share) for call in calls]}


def _record_pooling(evidence: Evidence) -> list[PoolingCall]:
    """Pass the batch through the model once more, and record its max-pooling calls."""
    model, objective = evidence.model, evidence.objective
    assert model is not None
    assert objective is not None
    size = pytree.count_examples(evidence.batch)
    why = find_grain_reason(model, objective.example_losses)
    parts = [MicroBatch(0, size)]
    if why is not None:
        parts = cut_grains(ShareRange(0, size, size), objective.grain, Layout(), why)
    buffers, device = Buffers.of(model), next(model.parameters()).device
    calls = []
    for part in parts:
        with preserve_generators(device):
            if part.grain is not None and evidence.arguments.get("key") is not None:
                seed_generators(evidence.arguments["key"].grain(part.grain), device)
            calls.append(_run_pass(evidence, part))
        buffers.restore()
    return [_concatenate(list(same)) for same in zip(*calls, strict=True)]


def _run_pass(evidence: Evidence, part: MicroBatch) -> list[PoolingCall]:
    """Run forward and backward for some examples, and record the calls."""
    model, objective = evidence.model, evidence.objective
    assert model is not None
    assert objective is not None
    device = next(model.parameters()).device
    piece = pytree.prepare_batch(
        pytree.take_examples(evidence.batch, part.start, part.stop), device
    )
    precision = evidence.arguments.get("precision", "float32")
    with _layer_names(model) as current, torch.enable_grad():
        recorder = _PoolingRecorder(part.stop - part.start, current)
        with recorder, autocast(precision, device):
            losses = objective.losses(model, piece, part.stop - part.start)
        if not recorder.calls:
            return []
        total = torch.stack([term.values.sum() for term in losses.values()]).sum()
        outputs = [call.y for call in recorder.calls]
        gradients = torch.autograd.grad(total, outputs, allow_unused=True)
    for call, gradient in zip(recorder.calls, gradients, strict=True):
        call.gradients.append(torch.zeros_like(call.y) if gradient is None else gradient)
    return recorder.calls


class _PoolingRecorder(TorchFunctionMode):
    """Record every max-pooling over [B, C, H, W]."""

    def __init__(self, size: int, layer: Callable[[], str]) -> None:
        super().__init__()
        self.calls: list[PoolingCall] = []
        self._size, self._layer = size, layer

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function not in _MAX_POOL:
            return function(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        if x.ndim != 4 or len(x) != self._size:
            return function(*args, **kwargs)
        arguments = dict(zip(_ARGUMENTS, args[1:], strict=False)) | kwargs
        arguments.pop("input", None)
        wants_indices = (
            arguments.pop("return_indices", False) or function is F.max_pool2d_with_indices
        )
        x = x if x.requires_grad else x.detach().requires_grad_()
        y, winners = F.max_pool2d_with_indices(x, **arguments)
        self.calls.append(PoolingCall(self._layer(), arguments, x.detach(), y, winners))
        return (y, winners) if wants_indices else y


@contextmanager
def _layer_names(model: nn.Module) -> Iterator[Callable[[], str]]:
    """Yield a function that names the module that is running."""
    names = {module: name for name, module in model.named_modules()}
    stack: list[str] = []

    def enter(module: nn.Module, _: Any) -> None:
        stack.append(f"{type(module).__name__} {names.get(module, '')}".strip())

    def leave(*_: Any) -> None:
        stack.pop()

    with register_module_forward_pre_hook(enter), register_module_forward_hook(leave):
        yield lambda: stack[-1] if stack else ""


def _concatenate(parts: list[PoolingCall]) -> PoolingCall:
    """Concatenate the same call for several parts of the batch."""
    first = parts[0]
    x, y, winners = (
        torch.cat([getattr(part, name).detach() for part in parts])
        for name in ("x", "y", "winners")
    )
    gradients = [torch.cat([part.gradients[0] for part in parts])]
    return PoolingCall(first.layer, first.arguments, x, y, winners, gradients)


def _describe_layer(call: PoolingCall, share: Tensor | None) -> dict[str, Any]:
    """Describe a call for a page: some of its channels and examples."""
    sizes = call.gradients[0].abs().sum((0, 2, 3))
    channels = sizes.topk(min(MAX_CHANNELS, len(sizes))).indices.sort().values
    example_bytes = len(channels) * (3 * call.x[0, 0].numel() + 7 * call.y[0, 0].numel())
    num = max(1, min(len(call.x), MAX_BYTES // example_bytes))
    places = torch.arange(len(call.x))
    if num < len(places):
        by = call.gradients[0].abs().flatten(1).sum(1) if share is None else share.abs()
        places = by.topk(num).indices.sort().values.cpu()
    ties = find_ties(call)

    def subset(values: Tensor) -> Tensor:
        return values.detach().cpu()[places][:, channels.cpu()]

    maps = subset(call.x).float()
    is_half = bool((maps[maps.isfinite()].abs() < 6e4).all())
    return {
        "layer": call.layer,
        "kernel": call.get_sizes("kernel_size"),
        "stride": call.get_sizes("stride"),
        "padding": call.get_sizes("padding"),
        "dilation": call.get_sizes("dilation"),
        "num_channels": call.x.shape[1],
        "channels": channels.tolist(),
        "places": places.tolist(),
        "inputs": pack(maps.half() if is_half else maps),  # [E, C, H, W]
        "winners": pack(subset(call.winners)),  # [E, C, h, w]
        "gradients": pack(narrow(subset(call.gradients[0]))),  # [E, C, h, w]
        "ties": ties.summarize(call.winners, call.gradients[0]),
        "maxima": pack(subset(ties.maxima)),  # [E, C, h, w]
        "tied": pack(subset(ties.tied)),  # [E, C, H, W]
        "chosen": pack(call.count_wins()[channels].cpu().int()),  # [C, H, W]
        "reached": pack((call.route_gradients() != 0).sum(0)[channels].cpu().int()),
    }


def _to_pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)
