"""What every test needs: one thread per maths library, the demo model's whereabouts. Knows nothing of a single room."""

from __future__ import annotations

import os

# Before torch is imported anywhere: the suite shares two cores with the servers that it starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for a network, also where there is one
# The sources as they are, which a test can take apart; set to nothing, the compiled modules are tested.
os.environ.setdefault("DISTSERVE_INTERPRETED", "1")

import pytest
from hypothesis import settings

# Examples are the same in every run, and none is too slow: the time of one says nothing on two busy cores.
settings.register_profile("house", derandomize=True, deadline=None)
settings.load_profile("house")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, saying so, where there is no CUDA device."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
