"""Streams a checkpoint's tensors into a model, one at a time and straight into the dtype it computes in.

A checkpoint is a folder of safetensors files or one GGUF file. Everything that can be wrong with its table of contents
is found before a weight is read; a module is packed as soon as it is full, so that at most one of them exists twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from distserve.engine.gguf_file import GGUFFile
from distserve.engine.models.base import Model, Slot
from distserve.engine.parallel import ALONE, Member, share
from distserve.errors import ModelError

# Saved although they are computed from the configuration.
_COMPUTED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", "rope_freqs.weight")

Slices = tuple[slice, ...]


class Checkpoint(Protocol):
    """A table of named tensors. Names are Hugging Face's, whatever the file calls them."""

    path: Path
    shapes: dict[str, tuple[int, ...]]

    def read(self, slot: Slot, slices: Slices, into: Tensor) -> None:
        """Fills `into` with a tensor's `slices`, converted to its dtype and device."""
        ...


def load(
    path: Path,
    model: Model,
    device: torch.device,
    progress: Callable[[float], None] = lambda fraction: None,
    member: Member = ALONE,
) -> None:
    """Fills the modules of `model` (on the meta device) from the checkpoint at `path` and packs them."""
    with ExitStack() as stack:
        checkpoint: Checkpoint = (
            GGUFCheckpoint(path, model) if path.is_file() else SafetensorsCheckpoint(path, stack, model.prefix)
        )
        slots = model.slots()
        _check(checkpoint, slots, model)
        todo: dict[str, list[Slot]] = {}
        for slot in slots:
            todo.setdefault(slot.module, []).append(slot)
        modules = [(name, module) for name, module in model.named_modules() if name in todo or name == "head"]
        for i, (name, module) in enumerate(modules):
            module.to_empty(device=device)
            for slot in todo.get(name, ()):
                slices = share(slot.shape, slot.split, slot.units, member)
                checkpoint.read(slot, slices, _target(module, slot))
            if callable(pack := getattr(module, "pack", None)):
                pack()
            progress((i + 1) / len(modules))


def _target(module: nn.Module, slot: Slot) -> Tensor:
    """The tensor, or the rows of it, that `slot` fills."""
    if slot.part is None:
        return module.get_parameter(slot.parameter).data
    part = module.part if slot.parameter == "weight" else module.bias_part
    return part(slot.part)  # type: ignore[operator, no-any-return]


def _check(checkpoint: Checkpoint, slots: list[Slot], model: Model) -> None:
    shapes, path = checkpoint.shapes, checkpoint.path
    missing = [slot.source for slot in slots if slot.source not in shapes]
    if missing:
        raise ModelError(
            f"the checkpoint {path} lacks {len(missing)} tensors, first {missing[0]}; it is incomplete, fetch it again"
        )
    for slot in slots:
        if shapes[slot.source] != slot.stored_shape:
            raise ModelError(
                f"the checkpoint {path} holds {slot.source} of shape {list(shapes[slot.source])}, its configuration "
                f"says {list(slot.stored_shape)}; the two do not belong together"
            )
    known = {slot.source for slot in slots}
    known |= {"lm_head.weight"} if model.spec.tied_embeddings else set()
    extra = [name for name in shapes if name not in known and not name.endswith(_COMPUTED)]
    if extra:
        raise ModelError(
            f"the checkpoint {path} holds {len(extra)} tensors that a {model.spec.family} model has no use for, first "
            f"{extra[0]}; its configuration names the wrong architecture"
        )


class SafetensorsCheckpoint:
    """`model.safetensors`, or the shards that `model.safetensors.index.json` lists. Open until `stack` closes. Where no
    name begins with `prefix`, all are taken to."""

    def __init__(self, path: Path, stack: ExitStack, prefix: str = "") -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        self._files: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in _shards(path):
            try:
                opened = stack.enter_context(safe_open(file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"cannot read {file} ({error}); it is missing or truncated, fetch it again") from error
            for name in opened.keys():  # noqa: SIM118
                self._files[name] = opened
                self.shapes[name] = tuple(opened.get_slice(name).get_shape())
        self._left_out = "" if any(name.startswith(prefix) for name in self.shapes) else prefix
        self.shapes = {self._left_out + name: shape for name, shape in self.shapes.items()}

    def read(self, slot: Slot, slices: Slices, into: Tensor) -> None:
        name = slot.source.removeprefix(self._left_out)
        values = self._files[name].get_slice(name)[slot.stored_slices(slices)]
        into.copy_(values.T if slot.transposed and values.dim() > 1 else values)


def _shards(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            return [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} cannot be read ({error}); fetch it again") from error
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if files:
        raise ModelError(f"{path} holds {len(files)} safetensors files but no {index.name}; fetch it again")
    others = "; convert its weights with save_pretrained(safe_serialization=True)" if list(path.glob("*.bin")) else ""
    raise ModelError(f"{path} holds no .safetensors file{others}")


class GGUFCheckpoint:
    """One GGUF file. It orders the rows of llama's queries and keys (not qwen2's, nor qwen3's) for its own rotation
    (pairs side by side, not half a head apart); they are put back as they were trained."""

    def __init__(self, path: Path, model: Model) -> None:
        import gguf

        self.path = path
        self._file = GGUFFile(path)
        family = model.spec.family
        self._reordered = family == "llama"
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], model.spec.num_layers)
        self._names = {}
        for slot in model.slots():
            stored = names.get_name(slot.source, try_suffixes=(".weight", ".bias"))
            self._names[slot.source] = slot.source if stored is None else stored
        ours = {stored: name for name, stored in self._names.items()}
        self.shapes = {ours.get(name, name): tensor.shape for name, tensor in self._file.tensors.items()}

    def read(self, slot: Slot, slices: Slices, into: Tensor) -> None:
        rows = np.arange(slot.shape[0])
        if slot.rotated_heads and self._reordered:
            rows = rows.reshape(slot.rotated_heads, -1, 2).swapaxes(1, 2).reshape(-1)
        first = 0
        for piece in self._file.read(self._names[slot.source], rows[slices[0]]):
            values = torch.from_numpy(piece if len(slices) == 1 else piece[:, slices[1]])
            into[first : first + len(values)].copy_(values)
            first += len(values)
