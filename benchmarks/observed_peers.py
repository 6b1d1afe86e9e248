"""Build steps of other libraries that compute gradients of all examples, each in its best mode.

| peer | result |
|---|---|
| torch.compile | the plain step |
| torch.func | every example's gradient, `vmap(grad)` |
| Opacus hooks | the same, in `.grad_sample` |
| Opacus ghost | every example's norm |
| BackPACK norms, BackPACK gradients | norms or gradients, of sequences of layers |
| JAX | every example's gradient of the perceptron, jitted |

A peer that is not installed, or does not support the model, is left out, with the reason.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["build_peers"]

Batch = tuple[Tensor, Tensor]
Step = Callable[[], object]


def build_peers(model: nn.Module, batch: Batch) -> tuple[dict[str, Step], dict[str, str]]:
    """Return the steps that work, and the reason why each other peer is left out."""
    steps, skipped = {}, {}
    for name, make in PEERS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                step = make(copy.deepcopy(model), batch)
                step()
            steps[name] = step
        except Exception as error:
            skipped[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"[:160]
    return steps, skipped


def _loss(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), targets.flatten())


def _build_compiled(model: nn.Module, batch: Batch) -> Step:
    compiled, (inputs, targets) = torch.compile(model), batch

    def step() -> None:
        model.zero_grad()
        _loss(compiled(inputs), targets).backward()

    return step


def _build_func(model: nn.Module, batch: Batch) -> Step:
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return _loss(torch.func.functional_call(model, weights, (x[None],)), y[None])

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    return lambda: each(parameters, *batch)


def _build_opacus_hooks(model: nn.Module, batch: Batch) -> Step:
    from opacus.grad_sample import GradSampleModule

    wrapped, (inputs, targets) = GradSampleModule(model), batch

    def step() -> None:
        wrapped.zero_grad()
        _loss(wrapped(inputs), targets).backward()

    return step


def _build_opacus_ghost(model: nn.Module, batch: Batch) -> Step:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping as Ghost

    wrapped, (inputs, targets) = Ghost(model, max_grad_norm=1.0, use_ghost_clipping=True), batch

    def step() -> None:
        wrapped.zero_grad()
        _loss(wrapped(inputs), targets).backward()
        wrapped.get_norm_sample()

    return step


def _build_backpack(extension: str) -> Callable[[nn.Module, Batch], Step]:
    def make(model: nn.Module, batch: Batch) -> Step:
        import backpack
        from backpack import extensions

        supported = nn.Linear, nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.Flatten
        if not isinstance(model, nn.Sequential) or not all(isinstance(m, supported) for m in model):
            raise ValueError("BackPACK needs a sequence of layers that it supports")
        extended, loss = backpack.extend(model), backpack.extend(nn.CrossEntropyLoss())
        inputs, targets = batch

        def step() -> None:
            extended.zero_grad()
            with backpack.backpack(getattr(extensions, extension)()):
                loss(extended(inputs), targets).backward()

        return step

    return make


def _build_jax(model: nn.Module, batch: Batch) -> Step:
    import jax
    import jax.numpy as jnp

    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if any(p.ndim > 2 for p in model.parameters()) or len(layers) * 2 != len([*model.parameters()]):
        raise ValueError("this step is only for a perceptron")
    weights = [(jnp.asarray(m.weight.detach()), jnp.asarray(m.bias.detach())) for m in layers]

    def loss(weights: Any, x: Any, y: Any) -> Any:
        for k, (w, b) in enumerate(weights):
            x = w @ x + b
            x = x if k + 1 == len(weights) else jax.nn.relu(x)
        return -jax.nn.log_softmax(x)[y]

    each = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))
    inputs, targets = (jnp.asarray(t.numpy()) for t in batch)
    return lambda: jax.block_until_ready(each(weights, inputs, targets))


PEERS: dict[str, Callable[[nn.Module, Batch], Step]] = {
    "torch.compile": _build_compiled,
    "torch.func": _build_func,
    "Opacus hooks": _build_opacus_hooks,
    "Opacus ghost": _build_opacus_ghost,
    "BackPACK norms": _build_backpack("BatchL2Grad"),
    "BackPACK gradients": _build_backpack("BatchGrad"),
    "JAX": _build_jax,
}
