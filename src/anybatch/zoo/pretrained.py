"""Models from a Transformers folder that return logits.

logits = model(input_ids, attention_mask).logits

The folder may come from a stranger. So Transformers gets only what cannot run code or use the
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
_CHANGEABLE = {"num_labels", "problem_type"}  # in addition to the keys of config.json


def pretrained(
    folder: str,
    kind: str = "AutoModelForSequenceClassification",
    trust_remote_code: bool = False,
    **config: Any,
) -> nn.Module:
    """Load a model and its weights from a folder.

    Args:
        folder: has config.json and model.safetensors, as save_pretrained writes them. Nothing is
            downloaded.
        kind: a model class of Transformers. A head that the folder lacks gets new weights.
        trust_remote_code: whether to run code in the folder, and to unpickle its weights if they
            are no safetensors. A recipe needs --allow-code for it.
        config: changes to keys of config.json, such as num_labels.

    Raises:
        ModelError: there is no such folder or kind, the folder or a change could run code, or
            Transformers cannot be imported.
    """
    if type(trust_remote_code) is not bool:
        raise ModelError(f"trust_remote_code = {trust_remote_code!r}. Expected true or false.")
    what = "models of a Transformers folder need transformers"
    transformers = import_extra("transformers", "transformers", what, ModelError)
    if not Path(folder, "config.json").is_file():
        raise ModelError(
            f"{folder} has no config.json. Expected a folder that save_pretrained has written. A "
            f"relative path is looked up from the folder that you are in."
        )
    check_files(folder, ModelError)
    model_class = _find_class(transformers, kind)
    if not trust_remote_code:
        _check_folder(Path(folder))
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    with _stay_offline(), _explain_errors(folder, kind):
        original = transformers.AutoConfig.from_pretrained(folder, **options)
        if not trust_remote_code:
            _check_changes(original.to_dict(), config)
        changed = transformers.AutoConfig.from_pretrained(folder, **options, **config)
        if not trust_remote_code:
            options["use_safetensors"] = True  # a .bin is a pickle
        return Logits(model_class.from_pretrained(folder, config=changed, **options))


def _find_class(transformers: Any, kind: str) -> Any:
    """Find a model class by its name.

    Raises:
        ModelError: there is none.
    """
    model_class = getattr(transformers, kind, None) if isinstance(kind, str) else None
    models = transformers.models.auto.auto_factory._BaseAutoModelClass, transformers.PreTrainedModel
    if not (isinstance(model_class, type) and issubclass(model_class, models)):
        raise ModelError(
            f"transformers has no model {kind!r}. Expected a class such as "
            f"'AutoModelForSequenceClassification' or 'AutoModelForCausalLM'."
        )
    return model_class


def _check_folder(folder: Path) -> None:
    """Check that a folder asks for nothing that could run code or load from elsewhere.

    Raises:
        ModelError: it does, or its config.json cannot be read.
    """
    file = folder / "config.json"
    advice = "Set trust_remote_code only if you trust the folder's maker"
    try:
        config = read_json(file.read_bytes())
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {error}. Copy the folder again.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file} holds a {type(config).__name__}. Expected a JSON object.")
    for name, value in _list_keys(config):
        is_kernel = name.lstrip("_").startswith(_IMPLEMENTATIONS) and "/" in json.dumps(value)
        if (name in _REFUSED and value) or is_kernel:
            raise ModelError(
                f"{file} states {name}, which can load code or files from elsewhere. Expected a "
                f"config.json without it. {advice}."
            )
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder} holds an adapter_config.json, which can load a model from elsewhere. "
            f"Merge the adapter into the model and save that. {advice}."
        )


def _check_changes(config: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Check that each change is to a plain key of config.json.

    Raises:
        ModelError: it is not, such as an argument of `from_pretrained` itself.
    """
    keys = sorted((config.keys() | _CHANGEABLE) - _REFUSED - {"auto_map"})
    for name, value in changes.items():
        is_plain = name in keys and not name.startswith("_")
        if not is_plain or name.startswith(_IMPLEMENTATIONS) or hasattr(value, "items"):
            raise ModelError(
                f"model.args.{name} is no plain key of config.json. Expected one of: "
                f"{', '.join(keys)}."
            )


def _list_keys(tree: Any) -> Iterator[tuple[str, Any]]:
    """List each key of nested objects, with its value."""
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            yield from node.items()
            nodes += node.values()
        elif isinstance(node, list):
            nodes += node


@contextmanager
def _stay_offline() -> Iterator[None]:
    """Keep the hub's client off the network, whatever the model's own code calls."""
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
    """Turn the errors of Transformers about a folder into one message."""
    try:
        yield
    except (AnybatchError, MemoryError):
        raise
    except Exception as error:  # the files may be anything, and so may what they raise
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{folder} cannot become a {kind}: {type(error).__name__}: {reason}. Expected "
            f"config.json and model.safetensors of that kind, as save_pretrained writes them."
        ) from error


@final
class Logits(nn.Module):
    """Model of Transformers that is called like those of the zoo.

    Args:
        model: as `from_pretrained` returns it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._reads = next(iter(signature(model.forward).parameters))  # input_ids, pixel_values

    def forward(self, inputs: Any) -> Tensor:
        """Compute logits from inputs, or from `Padded` inputs with their mask."""
        if isinstance(inputs, Tensor):
            logits: Tensor = self.model(**{self._reads: inputs}).logits
            return logits
        values, mask = inputs
        masked: Tensor = self.model(**{self._reads: values}, attention_mask=mask.long()).logits
        return masked
