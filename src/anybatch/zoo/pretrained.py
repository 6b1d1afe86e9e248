"""Models of a Transformers folder, made to yield logits.

logits = model(input_ids, attention_mask).logits

The folder may come from a stranger. So Transformers gets only what cannot run code or reach the
network: see `_check_folder` and `_check_changes`.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, final

from torch import Tensor, nn

from anybatch.errors import AnybatchError, ModelError
from anybatch.extras import import_extra
from anybatch.limits import check_files, read_json

__all__ = ["Logits", "pretrained"]

_REFUSED = {"configuration_files", "quantization_config"}
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
_CHANGEABLE = {"num_labels", "problem_type"}  # besides what config.json states


def pretrained(
    folder: str,
    kind: str = "AutoModelForSequenceClassification",
    trust_remote_code: bool = False,
    **config: Any,
) -> nn.Module:
    """The model that a folder holds, with its weights.

    Args:
        folder: with config.json and model.safetensors, as save_pretrained writes it. Nothing is
            looked up on a hub.
        kind: class of Transformers that it becomes; a head that the folder lacks is started anew.
        trust_remote_code: whether to run the code that the folder holds, and to unpickle its
            weights where they are no safetensors. A recipe needs --allow-code for it.
        config: what to change in its config.json, such as num_labels.

    Raises:
        ModelError: no such folder or kind, a folder or a change that could run code, or
            Transformers cannot be imported.
    """
    if type(trust_remote_code) is not bool:
        raise ModelError(f"trust_remote_code = {trust_remote_code!r}. Expected true or false.")
    what = "models of a Transformers folder need transformers"
    transformers = import_extra("transformers", "transformers", what, ModelError)
    if not Path(folder, "config.json").is_file():
        raise ModelError(
            f"{folder} has no config.json, expected a folder that save_pretrained has written. A "
            f"relative path is looked up from the folder that you are in."
        )
    check_files(folder, ModelError)
    found = _find_class(transformers, kind)
    if not trust_remote_code:
        _check_folder(Path(folder))
    how: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    with _stay_offline(), _explain_errors(folder, kind):
        own = transformers.AutoConfig.from_pretrained(folder, **how)
        if not trust_remote_code:
            _check_changes(own.to_dict(), config)
        own = transformers.AutoConfig.from_pretrained(folder, **how, **config)
        if not trust_remote_code:
            how["use_safetensors"] = True  # a .bin is a pickle
        return Logits(found.from_pretrained(folder, config=own, **how))


def _find_class(transformers: Any, kind: str) -> Any:
    """The class of that name, if it is one of models.

    Raises:
        ModelError: it is none.
    """
    found = getattr(transformers, kind, None) if isinstance(kind, str) else None
    models = transformers.models.auto.auto_factory._BaseAutoModelClass, transformers.PreTrainedModel
    if not (isinstance(found, type) and issubclass(found, models)):
        raise ModelError(
            f"transformers has no model {kind!r}, expected a class such as "
            f"'AutoModelForSequenceClassification' or 'AutoModelForCausalLM'."
        )
    return found


def _check_folder(folder: Path) -> None:
    """See that a folder asks for nothing that could run code or load from elsewhere.

    Raises:
        ModelError: it does, or its config.json cannot be read.
    """
    file, how = folder / "config.json", "Set trust_remote_code only if you trust the folder's maker"
    try:
        config = read_json(file.read_bytes())
    except ValueError as error:
        raise ModelError(f"{file} is no JSON: {error}. Copy the folder again.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file} holds a {type(config).__name__}. Expected a JSON object.")
    for name, value in _list_keys(config):
        is_kernel = name.lstrip("_").startswith(_IMPLEMENTATIONS) and "/" in json.dumps(value)
        if (name in _REFUSED and value) or is_kernel:
            raise ModelError(
                f"{file} states {name}, which can load code or files from elsewhere. Expected a "
                f"config.json without it. {how}."
            )
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder} holds an adapter_config.json, which can load a model from elsewhere. "
            f"Merge the adapter into the model and save that. {how}."
        )


def _check_changes(own: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """See that each change is one of a plain key of config.json.

    Raises:
        ModelError: it is none; among others those that `from_pretrained` itself takes.
    """
    known = sorted((own.keys() | _CHANGEABLE) - _REFUSED - {"auto_map"})
    for name, value in changes.items():
        is_plain = name in known and not name.startswith("_")
        if not is_plain or name.startswith(_IMPLEMENTATIONS) or hasattr(value, "items"):
            raise ModelError(
                f"model.args.{name} is no plain key of config.json. Expected one of: "
                f"{', '.join(known)}."
            )


def _list_keys(tree: Any) -> Iterator[tuple[str, Any]]:
    """Each key of nested objects, with its value."""
    left = [tree]
    while left:
        node = left.pop()
        if isinstance(node, dict):
            yield from node.items()
            left += node.values()
        elif isinstance(node, list):
            left += node


@contextmanager
def _stay_offline() -> Iterator[None]:
    """Keep the hub's client from the network, whatever a model's own code asks of it."""
    constants = import_extra(
        "huggingface_hub.constants", "transformers", "models need it", ModelError
    )
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def _explain_errors(folder: str, kind: str) -> Iterator[None]:
    """Turn what Transformers raises about a folder into one message."""
    try:
        yield
    except (AnybatchError, MemoryError):
        raise
    except Exception as error:  # the files may be anything, and so may what they raise
        came = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{folder} cannot become a {kind}: {type(error).__name__}: {came}. Expected "
            f"config.json and model.safetensors of that kind, as save_pretrained writes them."
        ) from error


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
