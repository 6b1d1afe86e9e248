"""Whether a parameter holds values that can be trained."""

from torch import Tensor
from torch.nn.parameter import is_lazy

from anybatch.errors import ModelError

__all__ = ["check_materialized"]


def check_materialized(name: str, parameter: Tensor, *, trains: bool = True) -> None:
    """Refuse a parameter without a shape, without values, or closed to autograd.

    Args:
        trains: whether autograd is to reach it.

    Raises:
        ModelError: a lazy parameter, one on the meta device, or one made in inference mode.
    """
    if is_lazy(parameter):
        raise ModelError(
            f"{name} has no shape yet, since its layer is lazy. Call the model on a few examples "
            f"first, under torch.no_grad(), and make the optimiser afterwards."
        )
    if parameter.is_meta:
        raise ModelError(
            f"{name} is on the meta device, which holds no values. Call "
            f"model.to_empty(device=...) and load its weights, or build the model elsewhere."
        )
    if trains and parameter.is_inference():
        raise ModelError(
            f"{name} was made under torch.inference_mode(), so autograd cannot train it. Build or "
            f"load the model outside of it, or train copy.deepcopy(model)."
        )
