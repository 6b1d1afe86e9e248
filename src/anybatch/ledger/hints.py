"""What a refusal in a loop of one's own says beyond its cause: how to name the examples."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from anybatch.errors import LedgerError

__all__ = ["hinted"]


@contextmanager
def hinted(size: int, is_dim_given: bool, without_examples: Mapping[str, str]) -> Iterator[None]:
    """Add hints to a refusal, once.

    Args:
        size: how many examples the ledger takes there to be.
        is_dim_given: whether the user has said along which dimension they lie.
        without_examples: names of modules that were called without any, and shapes of their inputs.
    """
    try:
        yield
    except LedgerError as error:
        text = str(error)
        if without_examples:
            calls = "; ".join(f"{n or 'the model'} ({s})" for n, s in without_examples.items())
            hint = (
                f"Tensors with as many rows as there are examples are expected, but these modules "
                f"were called without any: {calls}. Call the model as a whole, as one nn.Module, "
                f"or say how many examples there are: ab.observe(model, examples=B)."
            )
        elif not is_dim_given:
            hint = (
                f"The ledger takes the {size} rows along dimension 0 of the first tensor for "
                f"examples. If they are something else, say so: ab.observe(model, dim=1), or "
                f"examples=B."
            )
        else:
            raise
        if hint not in text:
            error.args = (f"{text} {hint}",)
        raise
