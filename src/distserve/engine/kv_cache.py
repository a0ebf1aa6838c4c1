"""The KV pool's memory: one tensor over a buffer that a transport can share, in the layout of `specs.KVLayout`.

On a CPU the pool is that buffer, so other processes read what attention wrote. On a GPU the pool lies in its memory and
the buffer mirrors it block by block: `export_blocks` before others read, `import_blocks` after they wrote. Which block
belongs to whom is the scheduler's business (`sched/blocks.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from mmap import mmap

import torch
from torch import Tensor

from distserve.specs import KVLayout

Buffer = mmap | memoryview | bytearray


def private_buffer(size: int) -> mmap:
    """Zeros of this process alone; a page takes memory when it is first written."""
    return mmap(-1, size)


class KVCache:
    """`num_blocks` blocks of `layout`. `layers`: each layer's [num_blocks, 2, KVH, block_size, D], a strided view."""

    def __init__(self, layout: KVLayout, num_blocks: int, buffer: Buffer, device: torch.device) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.buffer = buffer
        shape = (num_blocks, layout.num_layers, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)
        dtype = getattr(torch, layout.dtype)
        count = num_blocks * layout.block_bytes // layout.itemsize
        self._host = torch.frombuffer(buffer, dtype=dtype, count=count).view(shape)
        self._mirrored = device.type != "cpu"
        self.pool = torch.zeros(shape, dtype=dtype, device=device) if self._mirrored else self._host
        self.layers: list[Tensor] = [self.pool[:, i] for i in range(layout.num_layers)]

    def export_blocks(self, blocks: Sequence[int]) -> None:
        """Makes `buffer` hold what the device has in `blocks`."""
        if self._mirrored:
            ids = torch.tensor(blocks)
            self._host[ids] = self.pool[ids.to(self.pool.device)].cpu()

    def import_blocks(self, blocks: Sequence[int]) -> None:
        """Makes the device hold what `buffer` has in `blocks`."""
        if self._mirrored:
            ids = torch.tensor(blocks)
            self.pool[ids.to(self.pool.device)] = self._host[ids].to(self.pool.device)
