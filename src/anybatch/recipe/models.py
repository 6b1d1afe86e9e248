"""Build the model of a recipe, and load the weights that it starts from."""

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
from anybatch.recipe.code import has_remote_code
from anybatch.recipe.names import call_function, find_function
from anybatch.recipe.schema import ModelSection

__all__ = ["build_model", "load_weights", "use_seed"]

FILE = "model.safetensors"


@contextmanager
def use_seed(*numbers: int) -> Iterator[None]:
    """Seed the global generators from some numbers, and restore them afterwards."""
    with preserve_generators(torch.device("cpu")):
        seed_generators(hash_integers(*numbers))
        yield


def build_model(section: ModelSection, seed: int, *, allow_code: bool) -> nn.Module:
    """Build the model of a recipe, with the initial weights of a seed.

    Raises:
        RecipeError: a wrong name or argument; ModelError: a model that cannot be trained.
    """
    make = find_function(section.name, zoo.models, "model", allow_code=allow_code)
    if section.name in zoo.models:  # the user's own code may take URLs
        for name, value in section.args.items():
            check_local(value, f"model.args.{name}", RecipeError)
    if has_remote_code(section) and not allow_code:
        raise RecipeError(
            "model.args.trust_remote_code asks to run the code in the model's folder. That is done "
            "only with --allow-code. Repeat with it if you trust whoever made that folder."
        )
    with use_seed(seed, 0):
        model = call_function(make, section.args, "model.args")
    if not isinstance(model, nn.Module):
        raise RecipeError(
            f"model {section.name!r} made a {type(model).__name__}. Expected a torch.nn.Module."
        )
    survey_model(model)  # refuses what cannot be trained
    return model


def _find_weights(path: str) -> Path:
    """Find the safetensors file that `model.weights` names: the file itself, or one in a folder."""
    check_local(path, "model.weights", ModelError)
    file = Path(path, FILE) if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ModelError(
            f"model.weights = {path!r}: {file} is no file. Expected weights as safetensors, or a "
            f"folder with {FILE} in it, such as 'anybatch export' or save_pretrained write. A "
            f"relative path is looked up from the folder that you are in."
        )
    return file


def load_weights(model: nn.Module, path: str) -> str:
    """Load weights and buffers of a safetensors file into a model.

    Returns:
        The SHA-256 of the file.

    Raises:
        ModelError: the file is missing or damaged, or of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    file = _find_weights(path)
    content = file.read_bytes()
    try:
        weights = load(content)
    except SafetensorError as error:
        raise ModelError(
            f"{file} is no readable safetensors file: {error}. Is it cut off, or a pickle (.pt, "
            f".bin)? Convert it where you trust it: safetensors.torch.save_file."
        ) from error
    _check_tensors(file, weights, model.state_dict())
    model.load_state_dict(weights, strict=False)  # tied tensors are stored under one name
    return hashlib.sha256(content).hexdigest()


def _check_tensors(file: Path, weights: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Check that a file has every tensor of a model, under one of its names and in its shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name, tensor in weights.items():
        if shapes.get(name) != tuple(tensor.shape):
            has = f"{name} of shape {shapes[name]}" if name in shapes else "no such tensor"
            raise ModelError(
                f"{file} holds {name} of shape {tuple(tensor.shape)}. The model has {has}. Its "
                f"tensors are {', '.join(shapes)}. Do model.name and model.args make the model "
                f"that these weights belong to?"
            )
    addresses = {state[name].data_ptr() for name in weights}
    for name, tensor in state.items():
        if name not in weights and not (tensor.numel() and tensor.data_ptr() in addresses):
            raise ModelError(
                f"{file} lacks {name}. Expected all of the model's weights and buffers. It has: "
                f"{', '.join(weights)}."
            )
