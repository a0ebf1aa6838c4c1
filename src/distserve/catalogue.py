"""The shapes of well-known models by hub id, so that no checkpoint is needed to plan for them. Knows no weights: it
holds what the models' public config.json files say.

    "facebook/opt-66b", "demo", a folder with config.json, a .gguf file  --model_spec()-->  specs.ModelSpec
"""

from __future__ import annotations

import difflib
import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from distserve.errors import ModelError
from distserve.gguf_head import read_head
from distserve.specs import ModelSpec


def model_spec(name: str) -> ModelSpec:
    """The model of this hub id (in any case), alias, local folder with a config.json, or .gguf file (whose rotary
    scaling, no matter of shape, is left out). Raises `ModelError`."""
    path = Path(name).expanduser()
    if path.is_dir():
        return ModelSpec.from_config(read_json(path / "config.json"))
    if path.suffix == ".gguf":
        head = read_head(path)
        return ModelSpec.from_gguf(head.metadata, {name: entry.shape for name, entry in head.tensors.items()})
    configs = _configs()
    known = {known.lower(): known for known in configs}
    if found := known.get(name.lower()):
        return ModelSpec.from_config(configs[found])
    without_owner = {known.lower().rpartition("/")[2]: known for known in configs}
    if found := without_owner.get(name.lower().rpartition("/")[2]):
        raise ModelError(f"there is no model {name!r} in the catalogue: did you mean {found}?")
    near = {**without_owner, **known}
    close = difflib.get_close_matches(name.lower(), near, 1, cutoff=0.7)
    cure = f"did you mean {near[close[0]]}" if close else "give a hub id of docs/reference/models.md"
    raise ModelError(f"there is no model {name!r} in the catalogue: {cure}, or a folder with its config.json")


def canonical(name: str) -> str:
    """The hub id that stands for a model's shape, in lower case: of an alias or a model of the same shape, what it
    stands for; of any other name, itself."""
    return _aliases().get(name.lower(), name).lower()


def model_names() -> tuple[str, ...]:
    """Every hub id and alias, as it is written."""
    return tuple(_configs())


@cache
def _aliases() -> dict[str, str]:
    """Hub id by alias, in lower case."""
    source = resources.files("distserve").joinpath("data", "models.json")
    aliases: dict[str, str] = json.loads(source.read_text(encoding="utf-8"))["aliases"]
    return {alias.lower(): name for alias, name in aliases.items()}


@cache
def _configs() -> dict[str, dict[str, Any]]:
    """config.json, less what says nothing of shape, by hub id and alias."""
    source = resources.files("distserve").joinpath("data", "models.json")
    table = json.loads(source.read_text(encoding="utf-8"))
    models: dict[str, dict[str, Any]] = table["models"]
    return models | {alias: models[name] for alias, name in table["aliases"].items()}


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file of a model's folder. Raises `ModelError`."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror}; name a folder with a config.json") from error
    except ValueError as error:
        raise ModelError(f"{file} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise ModelError(f"{file} holds no JSON object; fetch it again")
    return found
