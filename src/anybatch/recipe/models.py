"""The model that a recipe's [model] states, and the weights that it starts from."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from anybatch import zoo
from anybatch.errors import ModelError, RecipeError
from anybatch.gradient.survey import survey_model
from anybatch.paths import check_local
from anybatch.randomness import hash_integers, preserve_generators, seed_generators
from anybatch.recipe.names import called, looked_up, trusts_remote_code
from anybatch.recipe.schema import ModelSection

__all__ = ["drawing_from", "model_of", "start_from", "weights_file"]

FILE = "model.safetensors"


@contextmanager
def drawing_from(*numbers: int) -> Iterator[None]:
    """Draws from the global generators are the same in every session."""
    with preserve_generators(torch.device("cpu")):
        seed_generators(hash_integers(*numbers))
        yield


def model_of(section: ModelSection, seed: int, *, allow_code: bool) -> nn.Module:
    """The model as its seed starts it.

    Raises:
        RecipeError: a name or argument that is not expected; ModelError: one that cannot be
            trained.
    """
    make = looked_up(section.name, zoo.models, "model", allow_code=allow_code)
    if section.name in zoo.models:  # the user's own code may take addresses
        for name, value in section.args.items():
            check_local(value, f"model.args.{name}", RecipeError)
    if trusts_remote_code(section) and not allow_code:
        raise RecipeError(
            "model.args.trust_remote_code asks to run the code in the model's folder. That is done "
            "only with --allow-code. Repeat with it if you trust whoever made that folder."
        )
    with drawing_from(seed, 0):
        model = called(make, section.args, "model.args")
    if not isinstance(model, nn.Module):
        raise RecipeError(
            f"model {section.name!r} made a {type(model).__name__}, expected a torch.nn.Module."
        )
    survey_model(model)  # refuses what cannot be trained
    return model


def weights_file(path: str) -> Path:
    """The safetensors file that `model.weights` names: itself, or the one in a folder.

    Raises:
        ModelError: there is none.
    """
    check_local(path, "model.weights", ModelError)
    file = Path(path, FILE) if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ModelError(
            f"model.weights = {path!r}: {file} is no file, expected weights as safetensors, or a "
            f"folder with {FILE} in it, such as 'anybatch export' or save_pretrained write. A "
            f"relative path is looked up from the folder that you are in."
        )
    return file


def start_from(model: nn.Module, path: str) -> str:
    """Give a model the weights and buffers of a safetensors file.

    Returns:
        The SHA-256 of the file.

    Raises:
        ModelError: a file that is missing or damaged, or of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    file = weights_file(path)
    content = file.read_bytes()
    try:
        stored = load(content)
    except SafetensorError as error:
        raise ModelError(
            f"{file} is no readable safetensors file: {error}. Is it cut off, or a pickle (.pt, "
            f".bin)? Convert it where you trust it: safetensors.torch.save_file."
        ) from error
    _check_names(file, stored, model.state_dict())
    model.load_state_dict(stored, strict=False)  # what is tied was stored once
    return hashlib.sha256(content).hexdigest()


def _check_names(file: Path, stored: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Every tensor of the model is stored under one of its names, in its shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    for name, tensor in stored.items():
        if shapes.get(name) != tuple(tensor.shape):
            came = f"{name} of shape {tuple(tensor.shape)}"
            raise ModelError(
                f"{file} holds {came}, expected {shapes.get(name, 'no such tensor')}: the model "
                f"has {', '.join(shapes)}. Do model.name and model.args make the model that these "
                f"weights belong to?"
            )
    found = {own[name].data_ptr() for name in stored}
    for name, tensor in own.items():
        if name not in stored and not (tensor.numel() and tensor.data_ptr() in found):
            raise ModelError(
                f"{file} lacks {name}, expected all of the model's weights and buffers. It has: "
                f"{', '.join(stored)}."
            )
