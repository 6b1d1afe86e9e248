"""What a look at every example's gradient costs: seconds a step, observed and not.

One round times every way of making the step once, in turn (A B A B ...); ratios are taken round by
round, and their median is reported. A step leaves a mean gradient in `.grad`:

    plain               PyTorch: forward, mean loss, backward
    channels_last       the same on channels_last tensors, where there are images
    unobserved          anybatch.batch_gradient
    observed            with every example's norm, in all and by parameter
    observed, default   the same with the kernels pinned to torch's own
    alignment           norms and <grad m_i, G>, in one micro-batch, and in four
    clipped             each example's gradient clipped to a norm
    gradients           every example's gradient whole
    peers               PyTorch's own, Opacus, BackPACK and JAX, where they are installed

Bytes are the most that tensors held within a step, counted by `PeakBytes`.

    python benchmarks/observed_step.py [--write] [--only NAME ...] [--clock cpu]
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.gradient import batch_gradient
from anybatch.gradient.clip import ClipExamples
from anybatch.gradient.fit import PeakBytes
from anybatch.layout import Layout
from anybatch.ledger import kernels
from anybatch.ledger.quantities import Observe
from anybatch.objective import Objective
from anybatch.zoo import gpt, mlp
from anybatch.zoo.losses import cross_entropy, token_cross_entropy
from machine import write

Step = Callable[[], object]


class LastOutput(nn.Module):
    """Logits from the last output of an LSTM: [B, T, 128] to [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(128, 256, batch_first=True)
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(x)[0][:, -1])
        return logits


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, with GroupNorm (He et al. 2016, 1512.03385)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, 1, bias=False),
            nn.GroupNorm(32, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.GroupNorm(32, width),
        )
        self.shortcut: nn.Module = nn.Identity()
        if channels != width:
            projection = nn.Conv2d(channels, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.GroupNorm(32, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.inner(x))


def resnet18() -> nn.Module:
    """ResNet-18 for images of 32x32."""
    widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
    blocks = [Block(a, b, 1 if a == b else 2) for a, b in zip(widths, widths[1:], strict=False)]
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.GroupNorm(32, 64), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def cnn() -> nn.Module:
    """Two convolutions of 3x3 with pooling, two linear layers, for images of 28x28."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(3136, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


@dataclass(frozen=True)
class Case:
    """A model, and what its ratios must reach."""

    make: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    bound: float  # observed over unobserved
    bound_plain: float | None  # observed over plain
    vocabulary: int = 0  # of inputs and targets that are tokens

    @property
    def loss(self) -> Callable[..., Any]:
        return token_cross_entropy if self.vocabulary else cross_entropy

    def batch(self) -> tuple[Tensor, Tensor]:
        if self.vocabulary:
            tokens = torch.randint(self.vocabulary, (self.inputs[0], self.inputs[1] + 1))
            return tokens[:, :-1], tokens[:, 1:]
        return torch.rand(self.inputs), torch.randint(10, self.inputs[:1])


CASES = {
    "MLP 784-512-512-10, B=256": Case(lambda: mlp([784], [512, 512]), (256, 784), 1.05, 0.65),
    "CNN 32-64-128-10, B=128": Case(cnn, (128, 1, 28, 28), 1.15, 0.9),
    "ResNet-18, GroupNorm, B=32": Case(resnet18, (32, 3, 32, 32), 1.2, 1.1),
    "GPT d=256, 4 layers, T=128, B=16": Case(
        lambda: gpt(256, 256, 4, 4, 128), (16, 128), 1.1, 0.75, vocabulary=256
    ),
    "GPT d=768, 2 layers, T=256, B=4": Case(
        lambda: gpt(256, 768, 2, 12, 256), (4, 256), 1.1, 0.75, vocabulary=256
    ),
    "LSTM 128-256, T=100, B=32": Case(LastOutput, (32, 100, 128), 1.5, None),
}
BOUNDS = {"observed, default": 1.2, "alignment": 1.4, "clipped": 1.3, "bytes": 1.15}


def plain(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Step:
    """Forward, mean loss, backward."""
    inputs, targets = batch

    def step() -> None:
        model.zero_grad()
        F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten()).backward()

    return step


def ours(case: Case, model: nn.Module, batch: Any, micro: int = 1, **options: Any) -> Step:
    """`batch_gradient`, in so many micro-batches."""
    objective = Objective(case.loss)
    layout = Layout(micro_batch=-(-len(batch[0]) // micro))

    def step() -> None:
        batch_gradient(model, objective, batch, layout=layout, **options)

    return step


def pinned(step: Step) -> Step:
    """The same with torch's own kernels."""

    def own() -> None:
        kernels.pin("torch")
        step()
        kernels.pin(None)

    return own


def ways(case: Case) -> dict[str, Step]:
    """Every way of making the step, by name."""
    torch.manual_seed(0)
    model, batch = case.make(), case.batch()
    norms = Observe(norms=True, parameter_norms=True)
    aligned = Observe(norms=True, alignment=True)
    found = {
        "plain": plain(model, batch),
        "unobserved": ours(case, model, batch),
        "observed": ours(case, model, batch, observe=norms),
        "observed, default": pinned(ours(case, model, batch, observe=norms)),
        "alignment": ours(case, model, batch, observe=aligned),
        "unobserved, 4": ours(case, model, batch, 4),
        "alignment, 4": ours(case, model, batch, 4, observe=aligned),
        "clipped": ours(case, model, batch, clip=ClipExamples(1.0)),
        "gradients": ours(case, model, batch, observe=Observe(gradients=True)),
    }
    if batch[0].ndim == 4:
        last = {"memory_format": torch.channels_last}
        images = batch[0].to(**last), batch[1]
        found["channels_last"] = plain(case.make().to(**last), images)
    return found


def rounds(
    steps: dict[str, Step], clock: Callable[[], float], seconds: float
) -> Iterator[dict[str, float]]:
    """Seconds of each step, round by round, after one round to warm up; at least 3."""
    for step in steps.values():
        step()
    begun, num = time.perf_counter(), 0
    while num < 3 or time.perf_counter() - begun < seconds:
        found = {}
        for name, step in steps.items():
            start = clock()
            step()
            found[name] = clock() - start
        yield found
        num += 1


def peak_bytes(step: Step) -> int:
    """The most that tensors made in a step hold."""
    with PeakBytes() as memory:
        step()
    return int(memory.peak)


OVER = {
    "plain": "plain",
    "channels_last": "plain",
    "unobserved": "plain",
    "alignment, 4": "unobserved, 4",
}


def compare(case: Case, clock: Callable[[], float], seconds: float, only=None) -> dict[str, Any]:
    steps = ways(case)
    if only:
        steps = {k: v for k, v in steps.items() if k in only}
    times = list(rounds(steps, clock, seconds))
    return {
        "rounds": len(times),
        "milliseconds": {n: 1e3 * median(t[n] for t in times) for n in steps},
        "over_plain": {n: median(t[n] / t["plain"] for t in times) for n in steps},
        "over_unobserved": {
            n: median(t[n] / t[OVER.get(n, "unobserved")] for t in times) for n in steps
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the raw result")
    parser.add_argument("--only", nargs="*", default=[""])
    parser.add_argument("--ways", nargs="*", default=None)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    for name, case in CASES.items():
        if not any(part in name for part in args.only):
            continue
        found = compare(case, clock, args.seconds, args.ways)
        print(f"{name}, {found['rounds']} rounds")
        for way, ms in found["milliseconds"].items():
            print(
                f"  {way:24} {ms:9.2f} ms, {found['over_plain'][way]:.3f} of plain, "
                f"{found['over_unobserved'][way]:.3f} of unobserved"
            )


if __name__ == "__main__":
    main()
