"""Models of a Transformers folder, made to yield logits.

logits = model(input_ids, attention_mask).logits
"""

from inspect import signature
from pathlib import Path
from typing import Any, final

from torch import Tensor, nn

from anybatch.errors import ModelError
from anybatch.extras import needed

__all__ = ["Logits", "pretrained"]


def pretrained(
    folder: str, kind: str = "AutoModelForSequenceClassification", **config: Any
) -> nn.Module:
    """The model that a folder holds, with its weights.

    Args:
        folder: with config.json and model.safetensors, as save_pretrained writes it. Nothing is
            looked up on a hub, and no code of the folder is run.
        kind: class of Transformers that it becomes; a head that the folder lacks is started anew.
        config: what to change in its config.json, such as num_labels.

    Raises:
        ModelError: no such folder or kind, or Transformers cannot be imported.
    """
    what = "models of a Transformers folder need transformers"
    transformers = needed("transformers", "transformers", what, ModelError)
    if not Path(folder, "config.json").is_file():
        raise ModelError(
            f"{folder} has no config.json, expected a folder that save_pretrained has written. A "
            f"relative path is looked up from the folder that you are in."
        )
    found: Any = getattr(transformers, kind, None)
    if not hasattr(found, "from_pretrained"):
        raise ModelError(
            f"transformers has no model {kind!r}, expected a class such as "
            f"'AutoModelForSequenceClassification' or 'AutoModelForCausalLM'."
        )
    made = found.from_pretrained(folder, local_files_only=True, **config)
    return Logits(made)


@final
class Logits(nn.Module):
    """A model of Transformers, called as those of the zoo are.

    Args:
        model: what `from_pretrained` has made.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._reads = next(iter(signature(model.forward).parameters))  # input_ids, pixel_values

    def forward(self, inputs: Any) -> Tensor:
        """Inputs, or `Padded` inputs with their mask, to logits."""
        if isinstance(inputs, Tensor):
            logits: Tensor = self.model(**{self._reads: inputs}).logits
            return logits
        values, mask = inputs
        masked: Tensor = self.model(**{self._reads: values}, attention_mask=mask.long()).logits
        return masked
