"""anybatch: one exact weight update from any batch.

    update gradient  =  sum_i  c_i * grad v_i(w)  +  grad Omega(w),      c_i = dR/dv_i

Names are imported when they are first used, so that the command line starts at once;
`__init__.pyi` tells type checkers where they are.
"""

from importlib import import_module

__version__ = "0.2.0"

_home = {
    "audit": ["assert_layout_invariant"],
    "batch": ["Pad", "Padded"],
    "example_losses": ["ExampleLosses"],
    "gradient": ["ClipExamples", "ClipNorm", "Gradient", "batch_gradient"],
    "layout": ["Layout"],
    "ledger": ["Ledger", "Observe", "observe"],
    "objective": ["Objective"],
    "optim": ["AdaScale", "Average", "LossScale"],
    "order": ["Order"],
    "order.by_length": ["ByLength", "padding_share"],
    "order.growing": ["Growing"],
    "order.weighted": ["Weighted"],
    "penalties": ["L1", "L2"],
    "pytree": ["MicroBatches", "Shared"],
    "randomness": ["ExampleKey", "Key"],
    "report": ["explain"],
    "reductions": ["GroupDRO", "Max", "Mean", "Sum", "Tilted", "TopFraction"],
    "schedules": ["Constant", "Cosine", "Exponential", "Inverse", "StepDecay", "WarmUp"],
    "runs": ["Run"],
    "training": ["Spike", "SpikeExample", "SpikeWatch", "Step", "batches", "evaluate", "steps"],
}
_module_of = {name: module for module, names in _home.items() for name in names}

__all__ = sorted(_module_of)


def __getattr__(name: str) -> object:
    if name not in _module_of:
        raise AttributeError(f"module 'anybatch' has no attribute {name!r}")
    value = getattr(import_module(f"anybatch.{_module_of[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
