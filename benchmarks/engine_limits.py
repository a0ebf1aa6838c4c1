"""What the core itself can do, measured between the contenders' turns: the limits that `benchmarks.engine` divides by.

- bandwidth: bytes per second that one core reads from memory: the best of several sums over 512 MiB of float32, far
  beyond any cache.
- gemm: bf16 floating-point operations per second of a square matrix product (1,024 and 2,048), through PyTorch's own
  library: the best of both sizes.
"""

from __future__ import annotations

import time

import torch

from benchmarks.harness import serve_commands


class Limits:
    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.memory = torch.ones(512 * 2**20 // 4)
        self.matrices = {
            n: (torch.randn(n, n, dtype=torch.bfloat16), torch.randn(n, n, dtype=torch.bfloat16)) for n in (1024, 2048)
        }

    def bandwidth(self) -> float:
        best = float("inf")
        for _ in range(4):
            begin = time.perf_counter()
            self.memory.sum()
            best = min(best, time.perf_counter() - begin)
        return self.memory.nbytes / best

    @torch.inference_mode()
    def gemm(self) -> float:
        rates = []
        for n, (left, right) in self.matrices.items():
            for _ in range(4):
                begin = time.perf_counter()
                torch.mm(left, right)
                rates.append(2 * n**3 / (time.perf_counter() - begin))
        return max(rates)


if __name__ == "__main__":
    contender = Limits()
    serve_commands({"bandwidth": contender.bandwidth, "gemm": contender.gemm})
