"""A small network in NumPy: convolution, ReLU, max-pooling, a linear layer, softmax.

Derivatives are written by hand; weights are [kernels, shifts, matrix, bias].
"""

import numpy as np


def forward(weights, x):
    """Return what each layer makes of images [B, 8, 8]."""
    kernel, shift, matrix, bias = weights
    patches = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    z = np.einsum("bijkl,ckl->bcij", patches, kernel) + shift[:, None, None]
    h = np.maximum(z, 0)
    windows = h.reshape(-1, 6, 3, 2, 3, 2).transpose(0, 1, 2, 4, 3, 5).reshape(-1, 6, 3, 3, 4)
    pooled = windows.max(-1).reshape(-1, 54)
    scores = pooled @ matrix.T + bias
    shifted = np.exp(scores - scores.max(1, keepdims=True))
    return patches, z, windows, pooled, shifted / shifted.sum(1, keepdims=True)


def losses(weights, x, y):
    return -np.log(forward(weights, x)[-1][np.arange(len(y)), y])


def winners(windows):
    """Mark the first of the largest inputs of each window with 1."""
    return np.eye(4)[windows.argmax(-1)]


def backward(weights, x, errors, split=False):
    """Return the sum over examples of the gradients, from the errors [B, 10] at the output."""
    patches, z, windows, pooled, _ = forward(weights, x)
    routes = winners(windows)
    if split:
        routes = np.broadcast_to(routes.max(0), routes.shape)
        routes = routes / routes.sum(-1, keepdims=True)
    back = (errors @ weights[2]).reshape(-1, 6, 3, 3, 1) * routes
    back = back.reshape(-1, 6, 3, 3, 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(z.shape) * (z > 0)
    kernel = np.einsum("bcij,bijkl->ckl", back, patches)
    return [kernel, back.sum((0, 2, 3)), errors.T @ pooled, errors.sum(0)]


def errors_of(weights, x, y):
    return forward(weights, x)[-1] - np.eye(10)[y]


def flat(arrays):
    return np.concatenate([array.ravel() for array in arrays])
