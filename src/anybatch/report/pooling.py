"""Max-pooling: which input won each window of an example, and which gradient arrived there.

    y[r, c] = max of x over window (r, c),    winner[r, c] = its place in the plane
    dv_i/dx[n] = sum of dv_i/dy[r, c] over the windows that n has won

One pass over the batch is watched at the operation itself, so it does not matter which layer calls
it. The gradient is that of each example's own loss v_i; nothing is aggregated over the batch but
how many examples have chosen an input.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from anybatch import pytree
from anybatch.gradient.buffers import Buffers
from anybatch.gradient.survey import find_grain_reason
from anybatch.layout import Layout, MicroBatch, ShareRange, cut_grains
from anybatch.precision import autocast
from anybatch.randomness import preserve_generators, seed_generators
from anybatch.report.evidence import Evidence
from anybatch.report.packing import narrowed, packed

__all__ = ["Pooled", "pooled", "pooling"]

CHANNELS = 6  # of a layer, at most: those that the most gradient passes
BYTES = 600_000  # of a layer's maps in a page, at most
_MAX_POOL = (F.max_pool2d, F.max_pool2d_with_indices, torch.max_pool2d)
_ARGUMENTS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


@dataclass(frozen=True, slots=True)
class Pooled:
    """One use of max-pooling by B examples."""

    layer: str  # the module that called it
    how: dict[str, Any]  # kernel_size, stride, ...
    x: Tensor  # [B, C, H, W]
    y: Tensor  # [B, C, h, w]
    winners: Tensor  # [B, C, h, w], places in the plane of H W inputs
    gradients: list[Tensor] = field(default_factory=list)  # dv_i/dy [B, C, h, w]; parts of a batch

    def routed(self) -> Tensor:
        """dv_i/dx through this layer: [B, C, H, W]."""
        planes = torch.zeros_like(self.x).flatten(2)
        planes.scatter_add_(2, self.winners.flatten(2), self.gradients[0].flatten(2).to(planes))
        return planes.view_as(self.x)

    def chosen(self) -> Tensor:
        """Count the examples in which each input won one window or more: [C, H, W]."""
        planes = torch.zeros(self.x.shape, dtype=torch.uint8, device=self.x.device).flatten(2)
        return planes.scatter_(2, self.winners.flatten(2), 1).sum(0).view(self.x.shape[1:])


def pooling(evidence: Evidence) -> dict[str, Any] | None:
    """Map every max-pooling layer, for as many examples as there is room for.

    Returns:
        None if the model has no such layer over images, or is not known.
    """
    if evidence.model is None or evidence.objective is None:
        return None
    found = pooled(evidence)
    if not found:
        return None
    share = evidence.ledger.share
    return {"layers": [_layer(one, share) for one in found]}


def pooled(evidence: Evidence) -> list[Pooled]:
    """Watch the examples of the batch pass max-pooling."""
    model, objective = evidence.model, evidence.objective
    assert model is not None
    assert objective is not None
    size = pytree.count_examples(evidence.batch)
    why = find_grain_reason(model, objective.example_losses)
    parts = [MicroBatch(0, size)]
    if why is not None:
        parts = cut_grains(ShareRange(0, size, size), objective.grain, Layout(), why)
    buffers, device = Buffers.of(model), next(model.parameters()).device
    seen = []
    for part in parts:
        with preserve_generators(device):
            if part.grain is not None and evidence.how.get("key") is not None:
                seed_generators(evidence.how["key"].grain(part.grain), device)
            seen.append(_pass(evidence, part))
        buffers.restore()
    return [_joined(list(same)) for same in zip(*seen, strict=True)]


def _pass(evidence: Evidence, part: MicroBatch) -> list[Pooled]:
    """Go forward and back for some examples."""
    model, objective = evidence.model, evidence.objective
    assert model is not None
    assert objective is not None
    device = next(model.parameters()).device
    piece = pytree.prepare_batch(
        pytree.take_examples(evidence.batch, part.start, part.stop), device
    )
    precision = evidence.how.get("precision", "float32")
    with _layer_names(model) as current, torch.enable_grad():
        watch = _Watch(part.stop - part.start, current)
        with watch, autocast(precision, device):
            losses = objective.losses(model, piece, part.stop - part.start)
        if not watch.seen:
            return []
        total = torch.stack([term.values.sum() for term in losses.values()]).sum()
        found = torch.autograd.grad(total, [one.y for one in watch.seen], allow_unused=True)
    for one, gradient in zip(watch.seen, found, strict=True):
        one.gradients.append(torch.zeros_like(one.y) if gradient is None else gradient)
    return watch.seen


class _Watch(TorchFunctionMode):
    """Record every max-pooling over [B, C, H, W]."""

    def __init__(self, size: int, layer: Callable[[], str]) -> None:
        super().__init__()
        self.seen: list[Pooled] = []
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
        how = dict(zip(_ARGUMENTS, args[1:], strict=False)) | kwargs
        how.pop("input", None)
        wants_indices = how.pop("return_indices", False) or function is F.max_pool2d_with_indices
        x = x if x.requires_grad else x.detach().requires_grad_()
        y, winners = F.max_pool2d_with_indices(x, **how)
        self.seen.append(Pooled(self._layer(), how, x.detach(), y, winners))
        return (y, winners) if wants_indices else y


@contextmanager
def _layer_names(model: nn.Module) -> Iterator[Callable[[], str]]:
    """Yield a function that names the module that is running."""
    stack: list[str] = []
    handles: list[Any] = []

    def leave(*_: Any) -> None:
        stack.pop()

    def listen(name: str, module: nn.Module) -> None:
        shown = f"{type(module).__name__} {name}".strip()
        handles.append(module.register_forward_pre_hook(lambda *_: stack.append(shown)))
        handles.append(module.register_forward_hook(leave))

    for name, module in model.named_modules():
        listen(name, module)
    try:
        yield lambda: stack[-1] if stack else ""
    finally:
        for handle in handles:
            handle.remove()


def _joined(parts: list[Pooled]) -> Pooled:
    """Join what was seen of several parts of the batch."""
    first = parts[0]
    x, y, winners = (
        torch.cat([getattr(part, name).detach() for part in parts])
        for name in ("x", "y", "winners")
    )
    gradients = [torch.cat([part.gradients[0] for part in parts])]
    return Pooled(first.layer, first.how, x, y, winners, gradients)


def _layer(one: Pooled, share: Tensor | None) -> dict[str, Any]:
    """Gather what a page shows of a layer: some channels and some examples."""
    passed = one.gradients[0].abs().sum((0, 2, 3))
    channels = passed.topk(min(CHANNELS, len(passed))).indices.sort().values
    an_example = len(channels) * (2 * one.x[0, 0].numel() + 6 * one.y[0, 0].numel())
    num = max(1, min(len(one.x), BYTES // an_example))
    places = torch.arange(len(one.x))
    if num < len(places):
        by = one.gradients[0].abs().flatten(1).sum(1) if share is None else share.abs()
        places = by.topk(num).indices.sort().values.cpu()
    kernel = one.how["kernel_size"]

    def kept(values: Tensor) -> Tensor:
        return values.detach().cpu()[places][:, channels.cpu()]

    maps = kept(one.x).float()
    is_half = bool((maps[maps.isfinite()].abs() < 6e4).all())
    return {
        "layer": one.layer,
        "kernel": _pair(kernel),
        "stride": _pair(one.how.get("stride") or kernel),
        "padding": _pair(one.how.get("padding", 0)),
        "dilation": _pair(one.how.get("dilation", 1)),
        "num_channels": one.x.shape[1],
        "channels": channels.tolist(),
        "places": places.tolist(),
        "inputs": packed(maps.half() if is_half else maps),  # [E, C, H, W]
        "winners": packed(kept(one.winners)),  # [E, C, h, w]
        "gradients": packed(narrowed(kept(one.gradients[0]))),  # [E, C, h, w]
        "chosen": packed(one.chosen()[channels].cpu().int()),  # [C, H, W]
        "reached": packed((one.routed() != 0).sum(0)[channels].cpu().int()),
    }


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)
