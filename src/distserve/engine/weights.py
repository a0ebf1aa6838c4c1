"""Streams a checkpoint's tensors into one rank's part of a model, one at a time and straight into the dtype it computes
in; of a tensor that ranks share only this one's slices.

A checkpoint is a folder of safetensors files or one GGUF file. Everything that can be wrong with its table of contents
is found before a weight is read, by every rank; a module is packed as soon as it is full, so that at most one of them
exists twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from distserve.engine.gguf_file import GGUFFile
from distserve.engine.models.base import Model, Slot
from distserve.engine.parallel import Split, share
from distserve.errors import ModelError

# Saved although they are computed from the configuration.
_COMPUTED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", "rope_freqs.weight")

_DTYPES = ("BF16", "F16", "F32", "F64")  # as safetensors calls them
_KEPT = 16 << 20  # bytes of a file that may stay mapped in memory between modules

Slices = tuple[slice, ...]


class Checkpoint(Protocol):
    """A table of named tensors. Names are Hugging Face's, whatever the file calls them."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]  # of tensors that are stored unquantized

    def read(self, slot: Slot, slices: Slices, into: Tensor) -> None:
        """Fills `into` with a tensor's `slices`, converted to its dtype and device."""
        ...

    def forget(self) -> None:
        """Gives back the memory in which what was read lies once more; called between modules."""
        ...


def load(
    path: Path,
    model: Model,
    device: torch.device,
    progress: Callable[[float], None] = lambda fraction: None,
    mixed: bool = True,
) -> None:
    """Fills the modules of `model` (on the meta device) from the checkpoint at `path` and packs them. `mixed`: whether
    its tensors may be stored in several dtypes."""
    with ExitStack() as stack:
        checkpoint: Checkpoint = (
            GGUFCheckpoint(path, model) if path.is_file() else SafetensorsCheckpoint(path, stack, model.prefix)
        )
        slots = model.slots()
        _check(checkpoint, slots, model)
        _check_dtypes(checkpoint, slots, mixed)
        todo = _held(slots, model)
        modules = [(name, module) for name, module in model.named_modules() if name in todo]
        for i, (name, module) in enumerate(modules):
            module.to_empty(device=device)
            for slot in todo[name]:
                slices = share(slot.shape, slot.split, slot.units, model.place.member)
                checkpoint.read(slot, slices, _target(module, slot))
            if callable(pack := getattr(module, "pack", None)):
                pack()
            checkpoint.forget()
            progress((i + 1) / len(modules))


def _held(slots: list[Slot], model: Model) -> dict[str, list[Slot]]:
    """The slots that fill this rank's modules, by module."""
    modules, index = dict(model.named_modules()), model.place.member.index
    todo: dict[str, list[Slot]] = {}
    for slot in slots:
        if slot.module in modules and (slot.split is not Split.ONCE or index == 0):
            todo.setdefault(slot.module, []).append(slot)
    filled = {f"{slot.module}.{slot.parameter}" for found in todo.values() for slot in found}
    assert filled == {name for name, _ in model.named_parameters()}, "a parameter that no tensor fills, or none has"
    return todo


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


def _check_dtypes(checkpoint: Checkpoint, slots: list[Slot], mixed: bool) -> None:
    used = {slot.source: checkpoint.dtypes[slot.source] for slot in slots if slot.source in checkpoint.dtypes}
    for source, dtype in used.items():
        if dtype not in _DTYPES:
            raise ModelError(
                f"the checkpoint {checkpoint.path} holds {source} as {dtype}, which is not supported; take one in "
                f"{', '.join(_DTYPES)}"
            )
    kinds = sorted(set(used.values()))
    if len(kinds) > 1 and not mixed:
        examples = ", ".join(f"{next(s for s, d in used.items() if d == kind)} as {kind}" for kind in kinds)
        raise ModelError(
            f"the checkpoint {checkpoint.path} mixes dtypes ({examples}); say with --dtype which one to compute in"
        )


class SafetensorsCheckpoint:
    """`model.safetensors`, or the shards that `model.safetensors.index.json` lists. Where no name begins with `prefix`,
    all are taken to. Files are open until `stack` closes, and reopened after `forget`: what was read of a mapped file
    counts as this process's memory until then."""

    def __init__(self, path: Path, stack: ExitStack, prefix: str = "") -> None:
        self.path = path
        self._places: dict[str, Path] = {}  # the file that holds a tensor
        self._open: dict[Path, Any] = {}
        self._since_forgotten = 0  # bytes read
        stack.callback(self._close)
        shapes, dtypes = {}, {}
        for file in _shards(path):
            opened = self._file(file)
            for name in opened.keys():  # noqa: SIM118
                self._places[name] = file
                table = opened.get_slice(name)
                shapes[name], dtypes[name] = tuple(table.get_shape()), table.get_dtype()
        left_out = "" if any(name.startswith(prefix) for name in shapes) else prefix
        self._left_out = left_out
        self.shapes = {left_out + name: shape for name, shape in shapes.items()}
        self.dtypes = {left_out + name: dtype for name, dtype in dtypes.items()}

    def _file(self, path: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"cannot read {path} ({error}); it is missing or truncated, fetch it again") from error
        return self._open[path]

    def read(self, slot: Slot, slices: Slices, into: Tensor) -> None:
        name = slot.source.removeprefix(self._left_out)
        values = self._file(self._places[name]).get_slice(name)[slot.stored_slices(slices)]
        into.copy_(values.T if slot.transposed and values.dim() > 1 else values)
        # Of columns, or of what is stored as columns, every page is touched.
        touched = slot.split is Split.ROW or slot.transposed
        self._since_forgotten += math.prod(slot.stored_shape) * values.itemsize if touched else values.nbytes

    def forget(self) -> None:
        if self._since_forgotten > _KEPT:
            self._close()
            self._since_forgotten = 0

    def _close(self) -> None:
        for opened in self._open.values():
            opened.__exit__(None, None, None)
        self._open.clear()


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
        self.dtypes: dict[str, str] = {}  # each tensor has its own kind of quantization

    def read(self, slot: Slot, slices: Slices, into: Tensor) -> None:
        rows = np.arange(slot.shape[0])
        if slot.rotated_heads and self._reordered:
            rows = rows.reshape(slot.rotated_heads, -1, 2).swapaxes(1, 2).reshape(-1)
        first = 0
        for piece in self._file.read(self._names[slot.source], rows[slices[0]]):
            values = torch.from_numpy(piece if len(slices) == 1 else piece[:, slices[1]])
            into[first : first + len(values)].copy_(values)
            first += len(values)
            self._file.forget()

    def forget(self) -> None:
        """Was done piece by piece."""
