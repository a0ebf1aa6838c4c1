"""What tests of pulls share: KV whose every byte is known, and each rank's part of it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from distserve.sharding import Sharding, heads_fit
from distserve.specs import KVLayout
from distserve.transfer.copying import Bytes
from distserve.transfer.layout import InstanceLayout


def whole_kv(model: KVLayout, num_blocks: int, seed: int = 7) -> NDArray[np.uint8]:
    """[block, layer, k|v, head, token, byte of the head]: random, so that bytes in a wrong place do not match."""
    shape = (num_blocks, model.num_layers, 2, model.num_kv_heads, model.block_size, model.head_dim * model.itemsize)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def cut(whole: NDArray[np.uint8], layout: InstanceLayout) -> list[Bytes]:
    """Each rank's memory, cut by numpy from the whole."""
    found = []
    for rank in range(layout.sharding.num_ranks):
        layers, heads = layout.sharding.layers(rank), layout.sharding.heads(rank)
        part = whole[:, layers.start : layers.stop, :, heads.start : heads.stop]
        found.append(np.ascontiguousarray(part).reshape(len(whole), layout.of_rank(rank).block_bytes))
    return found


@st.composite
def shardings(draw: st.DrawFn, num_layers: int, num_kv_heads: int) -> Sharding:
    """Stages of any lengths, not only the usual ones."""
    borders = draw(st.sets(st.integers(1, num_layers - 1), max_size=5)) if num_layers > 1 else set()
    edges = [0, *sorted(borders), num_layers]
    tp = draw(st.sampled_from([tp for tp in range(1, 13) if heads_fit(num_kv_heads, tp)]))
    return Sharding(num_kv_heads, tuple(end - first for first, end in pairwise(edges)), tp)
