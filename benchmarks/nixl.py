"""What a pull costs over NIXL, beside shared memory and memcpy.

    python -m benchmarks.nixl [--rounds 15] [--json FILE|-]

One request of 1,000 tokens of a model's real shape is pulled from an instance in another process by the code that
serves, checks included: through shared memory, over NIXL as it goes on one host (out of the other process's memory),
and over NIXL with TCP only (on the loopback device, where both ends of every byte cost a core of this machine). The
yardstick is as many bytes copied by memcpy. All take turns, under the same weather; each round takes other blocks than
the last. Source and target have a core each.

Also: the time of the first agent of a process, of first contact, and what an agent costs while nothing is read.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import cast

import msgspec

from benchmarks.harness import Worker, describe, machine, report, say, serve_commands, table
from benchmarks.resharding import BLOCK_SIZE, BLOCKS, LARGE, SETS, SMALL, TOKENS, Degrees, Yardstick, allocate, words
from distserve.catalogue import model_spec
from distserve.transfer.agent import Agent
from distserve.transfer.base import KVHandle, KVSource, Source, Transport
from distserve.transfer.layout import InstanceLayout
from distserve.transfer.nixl import NixlSource, NixlTransport
from distserve.transfer.shm import ShmSource, ShmTransport

PAIRS: dict[str, tuple[tuple[Degrees, Degrees], ...]] = {
    SMALL: (((1, 1), (1, 1)), ((3, 1), (1, 1)), ((1, 1), (3, 1)), ((1, 2), (1, 3))),
    LARGE: (((1, 1), (1, 1)), ((2, 1), (1, 1)), ((1, 2), (2, 1))),
}
WAYS: dict[str, dict[str, str]] = {  # environment of both ends
    "nixl": {},
    "nixl, TCP": {"UCX_TLS": "tcp,self", "UCX_USE_MT_MUTEX": "n"},  # as between hosts
}
IDLE = 5.0  # seconds to look at an idle agent


# -- in the workers ---------------------------------------------------------------------------------------------------


def layout_of(model: str, degrees: Degrees) -> InstanceLayout:
    return InstanceLayout.of(model_spec(model).kv_layout(BLOCK_SIZE, "bfloat16"), *degrees)


def sets_of(model: str) -> list[list[int]]:
    return [list(range(first, first + BLOCKS)) for first in range(0, BLOCKS * SETS[model], BLOCKS)]


def idle(seconds: float) -> float:
    """Share of a core that this process takes, all threads together, while nothing is asked of it."""
    before, began = time.process_time(), time.perf_counter()
    time.sleep(seconds)
    return (time.process_time() - before) / (time.perf_counter() - began)


def started_agent() -> tuple[Agent, float]:
    start = time.perf_counter()
    agent = Agent(one_host=True)
    return agent, time.perf_counter() - start


def source() -> None:
    kept: list[Source] = []

    def publish(model: str, degrees: list[int]) -> dict[str, str]:
        """Handles of every set of blocks by both transports, of the same memory."""
        layout, num_blocks = layout_of(model, (degrees[0], degrees[1])), BLOCKS * SETS[model]
        memories = allocate(layout, num_blocks)
        sources: dict[str, Source] = {
            "shm": ShmSource(memories, num_blocks, layout),
            "nixl": NixlSource(memories, num_blocks, layout, agent=Agent(one_host=True)),
        }
        kept.extend(sources.values())
        found = {}
        for name, end in sources.items():
            where = KVSource(f"prefill-{len(kept)}", 1, layout, end.location, notices="")
            handles = [KVHandle(where, 1, 1, TOKENS, tuple(ids), *end.publish(ids)) for ids in sets_of(model)]
            found[name] = msgspec.json.encode(handles).decode()
        return found

    def close() -> None:
        while kept:
            kept.pop().close()

    serve_commands({"publish": publish, "idle": idle, "close": close})


class Target:
    """The pulling worker: one instance at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()

    def open(self, model: str, degrees: list[int], handles: dict[str, str]) -> dict[str, float]:
        """Seconds to start an agent and to meet the source."""
        layout, num_blocks = layout_of(model, (degrees[0], degrees[1])), BLOCKS * SETS[model]
        self._memories = allocate(layout, num_blocks)
        self._agent, start = started_agent()
        self._transports: dict[str, Transport] = {
            "shm": ShmTransport(self._memories, num_blocks, layout),
            "nixl": NixlTransport(self._memories, num_blocks, layout, agent=self._agent),
        }
        self._sets = sets_of(model)
        self._handles = {name: msgspec.json.decode(text, type=list[KVHandle]) for name, text in handles.items()}
        self._yardstick = Yardstick(model)
        contact = 0.0
        for name, transport in self._transports.items():
            began = time.perf_counter()
            self._loop.run_until_complete(transport.connect(self._handles[name][0].source))
            contact = time.perf_counter() - began
        return {"start": start, "contact": contact}

    def pull(self, transport: str, number: int) -> float:
        at = number % len(self._sets)
        start = time.perf_counter()
        self._loop.run_until_complete(self._transports[transport].pull(self._handles[transport][at], self._sets[at]))
        return time.perf_counter() - start

    def copy(self, number: int) -> float:
        return self._loop.run_until_complete(self._yardstick.copy(number))

    def close(self) -> None:
        for transport in self._transports.values():
            transport.close()
        self._agent.close()
        for memory in self._memories:
            memory.close()
        del self._yardstick, self._transports, self._handles


# -- the benchmark ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one pair; seconds, medians."""

    model: str
    source: Degrees
    target: Degrees
    copied: int  # bytes
    seconds: dict[str, float]  # of a pull (or copy) by each way
    contact: dict[str, float]  # first contact


Ends = dict[str, tuple[Worker, Worker]]  # by way: source and target


def open_all(model: str, pair: tuple[Degrees, Degrees], ends: Ends) -> dict[str, dict[str, float]]:
    """By way: seconds to start the target's agent, and of first contact."""
    found = {}
    for way, (there, here) in ends.items():
        handles = there.ask("publish", model=model, degrees=pair[0])
        found[way] = cast(dict[str, float], here.ask("open", model=model, degrees=pair[1], handles=handles))
    return found


def close_all(ends: Ends) -> None:
    for there, here in ends.values():
        here.ask("close")
        there.ask("close")


def at_rest(ends: Ends) -> dict[str, dict[str, float]]:
    """By way: the first agent of a process, and agents that have met and pulled while nothing is asked of them."""
    found = open_all(SMALL, PAIRS[SMALL][0], ends)
    for way, (there, here) in ends.items():
        here.ask("pull", transport="nixl", number=0)
        found[way] |= {
            "idle source": there.seconds("idle", seconds=IDLE),
            "idle target": here.seconds("idle", seconds=IDLE),
        }
    close_all(ends)
    return found


def measure(model: str, pair: tuple[Degrees, Degrees], ends: Ends, rounds: int) -> Cost:
    contact = {way: found["contact"] for way, found in open_all(model, pair, ends).items()}
    target = ends["nixl"][1]
    times: dict[str, list[float]] = {name: [] for name in ("memcpy", "shm", *WAYS)}
    for number in range(rounds + 2):
        times["memcpy"].append(target.seconds("copy", number=number))
        times["shm"].append(target.seconds("pull", transport="shm", number=number))
        for way in WAYS:
            times[way].append(ends[way][1].seconds("pull", transport="nixl", number=number))
    close_all(ends)
    seconds = {name: statistics.median(found[2:]) for name, found in times.items()}
    copied = BLOCKS * model_spec(model).kv_layout(BLOCK_SIZE, "bfloat16").block_bytes
    return Cost(model, *pair, copied, seconds, contact)


@contextmanager
def workers() -> Iterator[Ends]:
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        yield {
            way: (
                stack.enter_context(Worker("benchmarks.nixl", "--worker", "source", core=cores[0], env=env)),
                stack.enter_context(Worker("benchmarks.nixl", "--worker", "target", core=cores[-1], env=env)),
            )
            for way, env in WAYS.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", metavar="FILE|-")
    parser.add_argument("--worker", choices=("source", "target"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker == "source":
        return source()
    if arguments.worker == "target":
        end = Target()
        return serve_commands({"open": end.open, "pull": end.pull, "copy": end.copy, "idle": idle, "close": end.close})
    kind, costs, text = machine(), [], []
    with workers() as ends:
        say("agents at rest")
        rest = at_rest(ends)
        for model, pairs in PAIRS.items():
            say(f"{model}: {len(pairs)} pairs")
            found = [measure(model, pair, ends, arguments.rounds) for pair in pairs]
            costs += found
            rows = [[f"{words(cost.source)} -> {words(cost.target)}", *speeds(cost)] for cost in found]
            text += ["", f"{model}, {TOKENS} tokens, {found[0].copied / 1e6:.1f} MB of KV", ""]
            text += [table(["pair", *found[0].seconds], rows)]
    contacts = {way: [1e3 * cost.contact[way] for cost in costs] for way in WAYS}
    rows = [
        [
            way,
            f"{of_way['start']:.2f} s",
            f"{min(contacts[way]):.0f} to {max(contacts[way]):.0f} ms",
            f"{of_way['idle source']:.2%}",
            f"{of_way['idle target']:.2%}",
        ]
        for way, of_way in rest.items()
    ]
    text += ["", table(["", "first agent", "first contact", "idle source", "idle target"], rows)]
    data: dict[str, object] = {"machine": kind, "costs": [asdict(cost) for cost in costs], "rest": rest}
    report(data, "\n".join([describe(kind), *text]), arguments.json)
    return None


def speeds(cost: Cost) -> list[str]:
    return [f"{1e3 * taken:.2f} ms, {cost.copied / taken / 1e9:.1f} GB/s" for taken in cost.seconds.values()]


if __name__ == "__main__":
    main()
