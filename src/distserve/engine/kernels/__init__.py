"""CPU kernels in C and how they are built, loaded and called. Knows tensors; knows no layer and no model."""

from distserve.engine.kernels.bindings import Kernels, PackedWeight, load, set_num_threads

__all__ = ["Kernels", "PackedWeight", "load", "set_num_threads"]
