"""The knee Lm: the prompt tokens that saturate a device. One rule, for what is measured and for what is predicted.

Below it a larger batch is nearly free, beyond it a batch only makes its members wait for each other (DistServe,
OSDI'24, section 3.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

SIZES = (32, 64, 128, 256, 512, 1024, 2048)  # tokens tried
GAIN = 1.1  # the knee is where twice the tokens give less than this times the tokens per second


def knee(seconds: Mapping[int, float], otherwise: int) -> int:
    """Of a device that computes a prompt of so many tokens (some of `SIZES`, ascending) in so many seconds: the first
    size beyond which it hardly gets more efficient, or the last. `otherwise`: where nothing was tried."""
    for (small, slow), (large, fast) in pairwise(seconds.items()):
        if large / fast < GAIN * small / slow:
            return small
    return max(seconds, default=otherwise)
