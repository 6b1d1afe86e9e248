"""Private names of torch that the package uses: every one is here, with its reason.

torch may rename a private name in any version. Where a public replacement gives the same result, a
little slower, it is used when the name is gone. Any other missing name is one clear error, which
says which versions of torch work.

Private attributes of torch's objects are not listed: `Tensor._version`, which torch's notes on
autograd describe, as they do `_saved_...` of the nodes of a graph, `_input_metadata` of these, the
hooks of parameters, and the dictionaries of modules (`_buffers`, ...).
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from anybatch.errors import VersionError

__all__ = [
    "BATCH_NORMS",
    "DROPOUTS",
    "PRIVATE_NAMES",
    "DisableTorchFunction",
    "TorchDispatchMode",
    "are_transforms_active",
    "copy_in_place",
    "find_dynamo",
    "find_reduce_scatter",
    "forward_mode_level",
    "function_modes",
    "functorch",
    "grouped_mm",
    "keeps_graph",
    "keystr",
    "leave_transforms",
    "linear_pointwise",
    "list_global_step_hooks",
    "multiply_in_place",
    "norms_of",
    "num_dispatch_modes",
    "preserve_version_counter",
    "reorder_linear_weight",
    "run_backward",
    "safe_softmax",
    "sum_in_place",
    "tree_flatten",
    "tree_flatten_with_path",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    "unsafe_view",
    "unscale_in_place",
]

PRIVATE_NAMES: dict[str, bool] = {}
"""Every private name by its path, and whether there is a replacement for it."""

_NO_REPLACEMENT: Any = object()


def _find(path: str, replacement: Any = _NO_REPLACEMENT) -> Any:
    """Return a private attribute of torch, or its replacement."""
    PRIVATE_NAMES[path] = replacement is not _NO_REPLACEMENT
    try:
        return _resolve(path)
    except (ImportError, AttributeError) as error:
        if replacement is not _NO_REPLACEMENT:
            return replacement
        raise VersionError(
            f"torch {torch.__version__} has no {path}, which anybatch uses. anybatch works with "
            f"torch>=2.13,<3 and was tried with 2.13.0. Install it with: "
            f"pip install 'torch==2.13.0'"
        ) from error


def _resolve(path: str) -> Any:
    """Return what a dotted path names: modules are imported, the rest are attributes."""
    owner, _, name = path.rpartition(".")
    if not owner:
        return importlib.import_module(name)
    parent = _resolve(owner)
    try:
        return getattr(parent, name)
    except AttributeError:
        return importlib.import_module(path)


# Nested containers. torch and other libraries register their own containers here, and only here.
_PYTREE = "torch.utils._pytree"
tree_flatten: Callable[..., Any] = _find(f"{_PYTREE}.tree_flatten")
tree_flatten_with_path: Callable[..., Any] = _find(f"{_PYTREE}.tree_flatten_with_path")
tree_leaves: Callable[..., list[Any]] = _find(f"{_PYTREE}.tree_leaves")
tree_map: Callable[..., Any] = _find(f"{_PYTREE}.tree_map")
tree_unflatten: Callable[..., Any] = _find(f"{_PYTREE}.tree_unflatten")
keystr: Callable[..., str] = _find(f"{_PYTREE}.keystr")


def _run_backward(
    values: Sequence[Tensor], gradients: Sequence[Tensor], keeps: bool, creates: bool, *_: Any
) -> None:
    torch.autograd.backward(values, gradients, keeps, creates)


# The engine behind `torch.autograd.backward`, without 40 us of checks of its arguments.
run_backward: Callable[..., Any] = _find("torch.autograd.graph._engine_run_backward", _run_backward)


def _multiply_in_place(tensors: list[Tensor], factor: Tensor | float) -> None:
    for tensor in tensors:
        tensor.mul_(factor)


def _sum_in_place(totals: list[Tensor], terms: list[Tensor]) -> None:
    for total, term in zip(totals, terms, strict=True):
        total.add_(term)


def _copy_in_place(tensors: list[Tensor], others: list[Tensor]) -> None:
    for tensor, other in zip(tensors, others, strict=True):
        tensor.copy_(other)


def _norms_of(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.linalg.vector_norm(tensor) for tensor in tensors]


def _unscale_in_place(tensors: list[Tensor], not_finite: Tensor, factor: Tensor) -> None:
    for tensor in tensors:
        if not tensor.isfinite().all():
            not_finite.fill_(1)
        tensor.mul_(factor)


# One kernel for a list of tensors instead of one for each tensor.
multiply_in_place: Callable[..., None] = _find("torch._foreach_mul_", _multiply_in_place)
sum_in_place: Callable[..., None] = _find("torch._foreach_add_", _sum_in_place)
copy_in_place: Callable[..., None] = _find("torch._foreach_copy_", _copy_in_place)
norms_of: Callable[..., Sequence[Tensor]] = _find("torch._foreach_norm", _norms_of)
unscale_in_place: Callable[..., None] = _find(
    "torch._amp_foreach_non_finite_check_and_unscale_", _unscale_in_place
)

# Base classes, so that layers which a user derives from them are recognised too.
BATCH_NORMS: Any = _find(
    "torch.nn.modules.batchnorm._BatchNorm",
    (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
)
DROPOUTS: Any = _find(
    "torch.nn.modules.dropout._DropoutNd",
    (
        *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
        *(nn.AlphaDropout, nn.FeatureAlphaDropout),
    ),
)

# Modes: torch's own computations with gradients must not be seen by the ledger's mode, which has to
# know which modes are entered; `PeakBytes` sees every operation.
DisableTorchFunction: Any = _find("torch._C.DisableTorchFunction")
TorchDispatchMode: Any = _find("torch.utils._python_dispatch.TorchDispatchMode")
function_modes: Callable[[], list[Any]] = _find("torch.overrides._get_current_function_mode_stack")
num_dispatch_modes: Callable[[], int] = _find("torch._C._len_torch_dispatch_stack")

# Transforms of torch.func, and forward-mode differentiation: what is made inside them is wrapped.
functorch: Any = _find("torch._C._functorch")
are_transforms_active: Callable[[], bool] = _find("torch._C._are_functorch_transforms_active")
leave_transforms: Callable[[], Any] = _find(
    "torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack"
)


def _always_keeps_graph() -> bool:
    """Say yes: a copy is made then that would not always be needed."""
    return True


# Autograd: a write that autograd must not see; whether a graph will be gone through again.
preserve_version_counter: Callable[..., Any] = _find(
    "torch.autograd.grad_mode._unsafe_preserve_version_counter"
)
keeps_graph: Callable[[], bool] = _find(
    "torch._C._autograd._get_current_graph_task_keep_graph", _always_keeps_graph
)

# Operations: the one that models call, or that torch's own layers are made of.
grouped_mm: Callable[..., Tensor] = _find("torch._grouped_mm", nn.functional.grouped_mm)
unsafe_view: Callable[..., Tensor] = _find("torch.ops.aten._unsafe_view", torch.reshape)
safe_softmax: Callable[..., Tensor] = _find("torch._safe_softmax")

# Products of oneDNN, for those who ask for measured kernels. None where torch is built without it.
linear_pointwise: Any = _find("torch.ops.mkldnn._linear_pointwise", None)
reorder_linear_weight: Any = _find("torch.ops.mkldnn._reorder_linear_weight", None)


_find("torch.autograd.forward_ad._current_level")  # it changes: only the module can be kept


def forward_mode_level() -> int:
    """Return the level of forward-mode differentiation; negative outside of it."""
    return forward_ad._current_level


def find_reduce_scatter() -> Any:
    """Return the class by which FSDP sums its shards: anybatch sums them in a fixed order."""
    return _find("torch.distributed.fsdp._fully_shard._fsdp_api.ReduceScatter")


def find_dynamo() -> Any:
    """Return the module that traces functions: a graph with its derivatives has no public switch.

    Importing it takes seconds.
    """
    _find("torch._dynamo.config.trace_autograd_ops")
    _find("torch._dynamo.lookup_backend")
    return _find("torch._dynamo")


def list_global_step_hooks() -> list[Any]:
    """List the hooks on the steps of all optimisers, besides those of anybatch.

    torch registers such hooks by public functions, and has none that lists them.
    """
    hooks = []
    for when in ("pre", "post"):
        hooks += _find(f"torch.optim.optimizer._global_optimizer_{when}_hooks").values()
    return [hook for hook in hooks if not getattr(hook, "__module__", "").startswith("anybatch.")]
