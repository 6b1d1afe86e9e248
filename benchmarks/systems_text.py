"""docs/systems.md, from the raw results of benchmarks/systems.py."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

__all__ = ["SYSTEMS", "Original", "row_of", "text_from"]


class Original(NamedTuple):
    """A system, and what is reported of it on its own data."""

    title: str
    reported: str
    on: str
    source: str


SYSTEMS = {
    "tf-mnist-beginners": Original(
        "TensorFlow, MNIST for beginners",
        "about 92 % right",
        "MNIST, test set, after 1,000 updates of 100",
        'the tutorial\'s text, "MNIST For ML Beginners": "This should be about 92%."',
    ),
    "tf-cifar10": Original(
        "TensorFlow, CIFAR-10 tutorial",
        "about 86 % right",
        "CIFAR-10, test set, after 100,000 updates of 128, which are 256 epochs",
        "tensorflow/models, tutorials/image/cifar10/cifar10_train.py, docstring",
    ),
    "caffe-lenet": Original(
        "Caffe, LeNet",
        "98.97 % right",
        "MNIST, test set, after 10,000 updates of 64",
        "BVLC/caffe, examples/mnist/readme.md, the log that it shows (Test score #0: 0.9897)",
    ),
    "dln-logistic": Original(
        "deeplearning.net, logistic regression",
        "7.489 % wrong",
        "MNIST, test set, at the best validation error (7.5 %), after 74 epochs",
        "lisa-lab/DeepLearningTutorials, doc/logreg.txt",
    ),
    "dln-mlp": Original(
        "deeplearning.net, multilayer perceptron",
        "1.65 % wrong",
        "MNIST, test set, at the best validation error (1.69 %), after 828 epochs",
        "lisa-lab/DeepLearningTutorials, doc/mlp.txt",
    ),
    "dln-sum": Original(
        "deeplearning.net, getting started: the sum",
        "nothing",
        "it states the objective and trains no model",
        "lisa-lab/DeepLearningTutorials, doc/gettingstarted.txt",
    ),
    "ng": Original(
        "Andrew Ng's course, exercise 4",
        "about 95.3 % right, give or take 1 %",
        "the 5,000 digits that it was *trained* on; there is no test set",
        "Machine Learning (Coursera), text of exercise 4, 2.6",
    ),
    "goyal": Original(
        "Goyal et al. 2017, large mini-batches",
        "23.60 ± 0.12 % wrong (top 1) at kn = 256; 23.74 ± 0.09 % at 8,192",
        "ImageNet, validation set, ResNet-50, 90 epochs, 5 runs",
        "arXiv 1706.02677",
    ),
}


def text_from(result: Mapping[str, Any]) -> str:
    """docs/systems.md of a result file."""
    systems: Mapping[str, Any] = result["systems"]
    (seeds,) = {len(runs) for runs in systems.values()}
    measured = "\n".join(row_of(name, runs) for name, runs in systems.items())
    reported = "\n".join(_reported(name) for name in systems)
    threads, processor = result["machine"]["threads"], result["machine"]["processor"]
    return HEAD.format(seeds=seeds, measured=measured, threads=threads, processor=processor) + (
        f"{REPORTED}{reported}\n{TAIL}"
    )


HEAD = """# The systems on Fashion-MNIST

Written by `make systems`, which runs `benchmarks/systems.py --write`, from the
[raw results](../benchmarks/results/systems.json). Each recipe is trained on the training set of
Fashion-MNIST (28x28 images of clothes in ten classes; Debian's dataset-fashion-mnist) and judged
by its official test set of 10,000 images, with the weights after the last update; for tf-cifar10
with their moving average, as in the original. Accuracy: mean ± standard deviation (n - 1) over
{seeds} seeds, of initial weights and order. CPU seconds: those of a run's one process, with the
evaluation after each epoch and the checkpoints; {processor}, {threads} thread a run, two runs
side by side. Where others use the machine too, they are an upper bound.

| recipe | accuracy, % | epochs | updates | CPU seconds | examples a CPU second |
|---|---|---|---|---|---|
{measured}
"""

REPORTED = """
## What is reported of the originals, on their own data

Not to be compared line by line: MNIST is easier than Fashion-MNIST, and several originals
trained far longer. The heads of the recipes say what they did and what differs.

| recipe | original | reported | on | source |
|---|---|---|---|---|
"""

TAIL = """
dln-mlp and dln-sum state one training twice, with Mean and with Sum.
`tests/test_sum_and_mean.py` shows for each system that Sum at the converted rate and penalty
makes the path of Mean, to 1e-12 after 50 updates in float64, and that without the penalty's
correction it does not.
"""


def row_of(name: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """A row of the first table."""
    accuracies = [100 * run["accuracy"] for run in runs]
    spread = f" ± {stdev(accuracies):.2f}" if len(runs) > 1 else ""
    epochs, updates = (_range([run[key] for run in runs]) for key in ("epochs", "updates"))
    seconds, examples = (sum(run[key] for run in runs) for key in ("cpu_seconds", "examples"))
    return (
        f"| [{name}](../recipes/{name}.toml) | {mean(accuracies):.2f}{spread} | {epochs} | "
        f"{updates} | {seconds / len(runs):.0f} | {examples / seconds:,.0f} |"
    )


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _reported(name: str) -> str:
    """A row of the second table."""
    return f"| {name} | " + " | ".join(SYSTEMS[name]) + " |"
