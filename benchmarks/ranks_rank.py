"""A contender of `benchmarks.ranks`: one rank by itself, which loads its part of a model and says what memory that
took, or measures its links to another rank.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path

import torch

from benchmarks.harness import serve_commands
from distserve.engine import collectives, host_links
from distserve.engine.base import EngineOptions
from distserve.engine.collectives import Links
from distserve.engine.hub import read_spec
from distserve.engine.loaded import load
from distserve.engine.models.base import build
from distserve.engine.parallel import Place, sharding_of

CPU = torch.device("cpu")
PAUSE = 1e-3  # seconds between two hand-overs


class Rank:
    def __init__(self, model: str, place: Place, links: Links) -> None:
        self.model, self.place, self.links = model, place, links

    def memory(self) -> dict[str, int]:
        """Bytes: of this rank's parameters, what loading them added at its peak, and what it left behind."""
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        loaded = load(EngineOptions(self.model, dtype="bfloat16"), lambda fraction, what: None, self.place, self.links)
        peak, left = _status("VmHWM"), _status("VmRSS")
        model = build(loaded.spec, torch.bfloat16, self.place, self.links)
        share = sum(parameter.nbytes for parameter in model.parameters())
        return {"share": share, "peak": peak - before, "left": left - before}

    def sums(self, rows: int, width: int, count: int) -> float:
        """Seconds a sum of [rows, width] fp32 over the ranks of a stage."""
        x = torch.zeros(rows, width)
        began = time.perf_counter()
        for _ in range(count):
            self.links.sum_(x)
        return (time.perf_counter() - began) / count

    def hand_over(self, rows: int, width: int, count: int) -> list[float]:
        """When each of `count` tensors [rows, width] fp32 was about to be sent (first stage), or was there (second), by
        a clock that all processes share. The second waits for each, as a stage does that has nothing to compute."""
        times = []
        for _ in range(count):
            if self.place.is_first:
                time.sleep(PAUSE)
                times.append(time.perf_counter())
                self.links.send(torch.zeros(rows, width))
            else:
                self.links.receive((rows, width))
                times.append(time.perf_counter())
        return times


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--meeting", type=Path, required=True)
    parser.add_argument("--gloo", action="store_true")
    arguments = parser.parse_args()
    place = Place(sharding_of(read_spec(Path(arguments.model)), arguments.tp, arguments.pp), arguments.rank)
    if arguments.gloo:
        links: Links = collectives.ProcessGroups(place, CPU, arguments.meeting)
    else:
        native = host_links.library()
        assert native is not None
        links = host_links.HostLinks(native, place, arguments.meeting)
    rank = Rank(arguments.model, place, links)
    serve_commands({"memory": rank.memory, "sums": rank.sums, "hand_over": rank.hand_over})
