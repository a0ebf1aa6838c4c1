"""What the core itself can do, measured between the contenders' turns: the limits that `benchmarks.engine` divides by.

- bandwidth: bytes per second that one core reads from memory, 512 MiB in huge pages, far beyond any cache: the best of
  several passes in a straight line and over four and eight 4 KB pages at once (which keeps more prefetchers busy).
- gemm: bf16 floating-point operations per second of a square matrix product (1,024 and 2,048), through PyTorch's own
  library: the best of both sizes.
"""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import time

import torch

from benchmarks.harness import OUT, serve_commands

SIZE = 512 * 2**20  # bytes
HUGE = 2 * 2**20  # a huge page
READ = r"""
#include <stddef.h>
#include <stdint.h>
typedef uint64_t lanes __attribute__((vector_size(64)));
#define PAGE 4096
/* Sums `size` bytes, `streams` pages at a time, a cache line of each in turn. */
uint64_t sum(const char *data, size_t size, size_t streams) {
    lanes total[8] = {0};
    for (size_t at = 0; at + streams * PAGE <= size; at += streams * PAGE)
        for (size_t line = 0; line < PAGE; line += 64)
            for (size_t s = 0; s < streams; s++) {
                __builtin_prefetch(data + at + (streams + s) * PAGE + line);
                total[s] += *(const lanes *)(data + at + s * PAGE + line);
            }
    lanes all = {0};
    for (size_t s = 0; s < 8; s++) all += total[s];
    uint64_t out = 0;
    for (size_t i = 0; i < 8; i++) out += all[i];
    return out;
}
"""


class Limits:
    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.memory = mmap.mmap(-1, SIZE + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(self.memory, dtype=torch.uint8).fill_(1)
        self.start = whole.data_ptr() + -whole.data_ptr() % HUGE
        self.matrices = [torch.randn(2, n, n, dtype=torch.bfloat16) for n in (1024, 2048)]
        source, library = OUT / "read.c", OUT / "read.so"
        source.write_text(READ)
        subprocess.run(["cc", "-O3", "-march=native", "-shared", "-fPIC", "-o", library, source], check=True)
        self._sum = ctypes.CDLL(str(library)).sum
        self._sum.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        self._sum.restype = ctypes.c_uint64

    def bandwidth(self) -> float:
        best = float("inf")
        for streams in (1, 4, 8) * 3:
            begin = time.perf_counter()
            self._sum(self.start, SIZE, streams)
            best = min(best, time.perf_counter() - begin)
        return SIZE / best

    @torch.inference_mode()
    def gemm(self) -> float:
        rates = []
        for left, right in self.matrices * 4:
            begin = time.perf_counter()
            torch.mm(left, right)
            rates.append(2 * len(left) ** 3 / (time.perf_counter() - begin))
        return max(rates)


if __name__ == "__main__":
    contender = Limits()
    serve_commands({"bandwidth": contender.bandwidth, "gemm": contender.gemm})
