"""Epochs by Keras for `trainers.py`, in a process for each backend, since it is fixed on import.

On torch the network is the same module, in a `TorchModuleWrapper`. On JAX it is built of Keras's
own layers, with the weights of the module. It is compiled in the first epoch and kept: later ones
begin with the first weights again.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import nn

from observed_models import Block
from trainers_ways import EPOCHS, LR, MOMENTUM, STARTS, Case, Epoch, compute_loss

__all__ = ["KerasProcess"]


class KerasProcess:
    """Process in which Keras trains on one backend."""

    def __init__(self, backend: str, folder: str = "") -> None:
        """Start the process.

        Args:
            folder: where packages are that this environment lacks.
        """
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, backend, folder), daemon=True)
        self._process.start()
        other.close()

    def train(self, name: str, is_first: bool) -> Epoch:
        """Train the network of a case for an epoch from its first weights, and evaluate."""
        self._connection.send((name, is_first))
        epoch = self._connection.recv()
        if not isinstance(epoch, Epoch):
            raise RuntimeError(f"Keras failed: {epoch}")
        return epoch

    def close(self) -> None:
        """End the process."""
        self._connection.send(None)
        self._process.join()


def serve(connection: Connection, backend: str, folder: str) -> None:
    """Answer each name of a case with an epoch, or with an error, until there is none."""
    os.environ["KERAS_BACKEND"] = backend
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    torch.set_num_threads(1)
    if folder:
        sys.path.append(folder)
    trains: dict[str, Callable[[bool], Epoch]] = {}
    while (request := connection.recv()) is not None:
        name, is_first = request
        try:
            if name not in trains:
                trains = {name: build_training((EPOCHS | STARTS)[name], backend)}
            connection.send(trains[name](is_first))
        except Exception as error:
            connection.send(repr(error))


def build_training(case: Case, backend: str) -> Callable[[bool], Epoch]:
    """Build a network and the function that trains it for an epoch."""
    import keras

    data = [prepare(tensor, backend) for part in case.make_data() for tensor in part or ()]
    inputs = keras.Input(data[0].shape[1:], dtype=str(data[0].dtype))
    module, weights = case.make_network(), Weights()
    if backend == "torch":
        shape = None, *module(torch.from_numpy(data[0][:1])).shape[1:]
        outputs = keras.layers.TorchModuleWrapper(module, output_shape=shape)(inputs)
    else:
        outputs = build_layers(module, inputs, weights)
    model = keras.Model(inputs, outputs)
    weights.assign()
    sparse = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    loss = sparse if backend == "jax" else (lambda y, logits: compute_loss(logits, y.long()))
    optimizer = keras.optimizers.SGD(LR, momentum=MOMENTUM)
    model.compile(optimizer, loss=loss)
    optimizer.build(model.trainable_variables)
    variables = [*model.variables, *optimizer.variables]
    first = [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]
    how = {"batch_size": case.batch_size, "verbose": 0}

    def train(is_first: bool) -> Epoch:
        for variable, value in zip(variables, first, strict=True):
            variable.assign(value)
        wall, start = time.perf_counter(), time.process_time()
        history = model.fit(
            *data[:2],
            shuffle=False,
            validation_data=data[2:],
            validation_batch_size=case.batch_size,
            **how,
        ).history
        seconds = time.process_time() - start, time.perf_counter() - wall
        train_loss = float(model.evaluate(*data[:2], **how)) if is_first else None
        return Epoch(*seconds, history["val_loss"][-1], train_loss)

    return train


def prepare(tensor: torch.Tensor, backend: str) -> np.ndarray:
    """Return an array; images for JAX have their channels last, and its integers have 32 bits."""
    array = tensor.numpy()
    if backend == "jax" and array.ndim == 4:
        return np.ascontiguousarray(array.transpose(0, 2, 3, 1))
    return array.astype("int32") if backend == "jax" and array.dtype == np.int64 else array


class Weights:
    """Weights of a module for the layers of Keras that stand for it."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Any, list[np.ndarray]]] = []

    def add(self, layer: Any, module: nn.Module, axes: tuple[int, ...] = ()) -> Any:
        """Remember the weights of a layer; axes order those of its matrix."""
        parameters = [p.detach().numpy() for p in module.parameters()]
        if axes:
            parameters[0] = parameters[0].transpose(axes)
        self._pairs.append((layer, parameters))
        return layer

    def assign(self) -> None:
        """Give every layer its weights."""
        for layer, arrays in self._pairs:
            layer.set_weights(arrays)


def build_layers(module: nn.Module, x: Any, weights: Weights) -> Any:
    """Build layers of Keras, with channels last, that compute the same as a module."""
    from keras import layers, ops

    match module:
        case nn.Sequential():
            for child in module:
                x = build_layers(child, x, weights)
            return x
        case Block():
            added = build_layers(module.inner, x, weights)
            return ops.relu(build_layers(module.shortcut, x, weights) + added)
        case nn.Conv2d(padding=(side, _), stride=(stride, _), kernel_size=size):
            x = layers.ZeroPadding2D(side)(x) if side else x
            bias = module.bias is not None
            layer = layers.Conv2D(module.out_channels, size, stride, use_bias=bias)
            return weights.add(layer, module, (2, 3, 1, 0))(x)
        case nn.Linear():
            return weights.add(layers.Dense(module.out_features), module, (1, 0))(x)
        case nn.GroupNorm():
            layer = layers.GroupNormalization(module.num_groups, epsilon=module.eps)
            return weights.add(layer, module)(x)
        case nn.MaxPool2d():
            return layers.MaxPooling2D(module.kernel_size)(x)
        case nn.AdaptiveAvgPool2d():
            return layers.GlobalAveragePooling2D(keepdims=True)(x)
        case nn.Flatten():  # torch flattens with channels first
            return layers.Flatten()(layers.Permute((3, 1, 2))(x))
        case nn.ReLU():
            return ops.relu(x)
        case nn.Identity():
            return x
    return build_decoder(module, x, weights)


def build_decoder(module: Any, tokens: Any, weights: Weights) -> Any:
    """Build the layers of `anybatch.zoo.gpt`."""
    from keras import layers, ops

    def normalize(norm: nn.LayerNorm, h: Any) -> Any:
        return weights.add(layers.LayerNormalization(epsilon=norm.eps), norm)(h)

    class Positions(layers.Layer):
        def build(self, shape: Any) -> None:
            self.table = self.add_weight(shape[1:])

        def call(self, h: Any) -> Any:
            return h + self.table

    length, width = module.positions.weight.shape
    embedding = layers.ReversibleEmbedding(*module.tokens.weight.shape)
    weights.add(embedding, module.tokens)
    h = weights.add(Positions(), module.positions)(embedding(tokens))
    for block in module.blocks:
        heads = block.attention.heads
        qkv = build_layers(block.attention.qkv, normalize(block.norm1, h), weights)
        split = ops.reshape(qkv, (-1, length, 3, heads, width // heads))
        q, k, v = (split[:, :, i] for i in range(3))
        mixed = ops.reshape(ops.dot_product_attention(q, k, v, is_causal=True), (-1, length, width))
        h = h + build_layers(block.attention.out, mixed, weights)
        inner = build_layers(block.mlp[0], normalize(block.norm2, h), weights)
        h = h + build_layers(block.mlp[2], ops.gelu(inner, approximate=True), weights)
    return embedding(normalize(module.norm, h), reverse=True)
