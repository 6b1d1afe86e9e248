"""What other libraries take for the gradients of all examples, each in its best mode.

| peer | what it makes |
|---|---|
| torch.compile | the plain step |
| torch.func | every example's gradient, `vmap(grad)` |
| Opacus hooks | the same, in `.grad_sample` |
| Opacus ghost | every example's norm |
| BackPACK norms, BackPACK gradients | either, of sequences of layers |
| JAX | every example's gradient of the perceptron, jitted |

A peer that is not installed, or does not take the model, is left out, with the reason.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["peers"]

Batch = tuple[Tensor, Tensor]
Step = Callable[[], object]


def peers(model: nn.Module, batch: Batch) -> tuple[dict[str, Step], dict[str, str]]:
    """Steps that have been made once, and why the others are left out."""
    found, skipped = {}, {}
    for name, make in PEERS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                step = make(copy.deepcopy(model), batch)
                step()
            found[name] = step
        except Exception as error:
            skipped[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"[:160]
    return found, skipped


def _loss(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), targets.flatten())


def _compiled(model: nn.Module, batch: Batch) -> Step:
    compiled, (inputs, targets) = torch.compile(model), batch

    def step() -> None:
        model.zero_grad()
        _loss(compiled(inputs), targets).backward()

    return step


def _func(model: nn.Module, batch: Batch) -> Step:
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(own: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return _loss(torch.func.functional_call(model, own, (x[None],)), y[None])

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    return lambda: each(parameters, *batch)


def _opacus_hooks(model: nn.Module, batch: Batch) -> Step:
    from opacus.grad_sample import GradSampleModule

    wrapped, (inputs, targets) = GradSampleModule(model), batch

    def step() -> None:
        wrapped.zero_grad()
        _loss(wrapped(inputs), targets).backward()

    return step


def _opacus_ghost(model: nn.Module, batch: Batch) -> Step:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping as Ghost

    wrapped, (inputs, targets) = Ghost(model, max_grad_norm=1.0, use_ghost_clipping=True), batch

    def step() -> None:
        wrapped.zero_grad()
        _loss(wrapped(inputs), targets).backward()
        wrapped.get_norm_sample()

    return step


def _backpack(extension: str) -> Callable[[nn.Module, Batch], Step]:
    def make(model: nn.Module, batch: Batch) -> Step:
        import backpack
        from backpack import extensions

        known = nn.Linear, nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.Flatten
        if not isinstance(model, nn.Sequential) or not all(isinstance(m, known) for m in model):
            raise ValueError("it takes sequences of its own layers")
        extended, loss = backpack.extend(model), backpack.extend(nn.CrossEntropyLoss())
        inputs, targets = batch

        def step() -> None:
            extended.zero_grad()
            with backpack.backpack(getattr(extensions, extension)()):
                loss(extended(inputs), targets).backward()

        return step

    return make


def _jax(model: nn.Module, batch: Batch) -> Step:
    import jax
    import jax.numpy as jnp

    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if any(p.ndim > 2 for p in model.parameters()) or len(layers) * 2 != len([*model.parameters()]):
        raise ValueError("written for a perceptron")
    weights = [(jnp.asarray(m.weight.detach()), jnp.asarray(m.bias.detach())) for m in layers]

    def loss(own: Any, x: Any, y: Any) -> Any:
        for k, (w, b) in enumerate(own):
            x = w @ x + b
            x = x if k + 1 == len(own) else jax.nn.relu(x)
        return -jax.nn.log_softmax(x)[y]

    each = jax.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))
    inputs, targets = (jnp.asarray(t.numpy()) for t in batch)
    return lambda: jax.block_until_ready(each(weights, inputs, targets))


PEERS: dict[str, Callable[[nn.Module, Batch], Step]] = {
    "torch.compile": _compiled,
    "torch.func": _func,
    "Opacus hooks": _opacus_hooks,
    "Opacus ghost": _opacus_ghost,
    "BackPACK norms": _backpack("BatchL2Grad"),
    "BackPACK gradients": _backpack("BatchGrad"),
    "JAX": _jax,
}
