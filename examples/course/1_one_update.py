# %% [markdown]
# # 1. How does one update come out of many examples?
#
# A model has numbers that training changes, its *weights*. A *loss* says how bad the model is on
# one example. The *gradient* of a loss is its derivative by each weight.
#
# Here are two examples and five weights. The first loss is 2, the second is -2, so their mean is 0.
# Is the gradient 0 too?

# %%
import numpy as np
import torch
from drawing import draw_bars

import anybatch as ab
from anybatch import reference

gradients = np.array([[1.5, -2.0, 1.1, 0.4, -0.9], [1.2, 2.3, -1.1, -0.8, -0.7]])
start = np.array([[0.0, 0.0, 0.0, 3.2, -0.8]])
rate = 0.1
np.set_printoptions(precision=3, suppress=True)

# %% [markdown]
# ## By hand, one example after the other
#
# The loss of an example is its row times the weights. Its gradient is then the row itself.
# `reference` is the method in plain NumPy. It sends each example forward and back on its own. Then
# it adds up the gradients and divides by their number.

# %%
network = reference.Network([reference.Dense(5, 1, bias=False)], [{"weight": start}])
by_hand = reference.batch_gradient(network, reference.Output(), gradients, [None, None])
for example in by_hand.examples:
    print(f"loss {example.loss:+.0f}, gradient {example.gradients[0]['weight'][0]}")
mean = by_hand.gradients[0]["weight"]
print(f"mean {abs(by_hand.loss):2.0f}, gradient {mean[0] + 0.0}")

# %% [markdown]
# The mean of the losses is 0. The mean of the gradients is not. A derivative does not ask how large
# a loss is. It asks how the loss changes.
#
# ## The same with the engine, all examples at once

# %%
model = torch.nn.Linear(5, 1, bias=False).double()
model.weight.data = torch.from_numpy(start.copy())
objective = ab.Objective(lambda model, rows: model(rows)[:, 0])  # one loss for each example
optimizer = torch.optim.SGD(model.parameters(), lr=rate)
gradient = ab.batch_gradient(model, objective, torch.from_numpy(gradients))
print("the same gradient:", np.allclose(model.weight.grad.numpy(), mean, rtol=0, atol=1e-15))

# %% [markdown]
# ## One update
#
# `batch_gradient` writes the mean gradient into `.grad`. The optimiser reads it there, and takes
# 0.1 times the gradient off the weights.

# %%
optimizer.step()
after = start - rate * mean
print("weights before ", start[0])
print("weights after  ", after[0])
print("the same weights:", np.allclose(model.weight.detach().numpy(), after, rtol=0, atol=1e-15))

# %% [markdown]
# The third weight stays where it is: 1.1 and -1.1 cancel. No other weight stays. In the picture
# each green bar ends in the middle between the ends of the two bars to its left.

# %%
bars = {"example 1, loss 2": gradients[0], "example 2, loss -2": gradients[1], "mean": mean[0]}
weights = [f"weight {i}" for i in range(1, 6)]
title = "Losses 2 and -2 cancel. Their gradients do not."
draw_bars(title, bars, weights, ticks=[-2, -1, 0, 1, 2]).save("1_one_update.svg")
