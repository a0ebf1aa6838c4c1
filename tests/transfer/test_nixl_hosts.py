"""A pull between two hosts: network and process namespaces of this machine, joined by a cable and nothing else.
Neither side sees the other's memory, so the bytes go over TCP. Skipped where such namespaces may not be made.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import pytest
from tests.transfer.contract import MODEL, NUM_BLOCKS, of
from tests.transfer.support import cut, whole_kv

from distserve.errors import PullError, UsageError
from distserve.transfer import agent
from distserve.transfer.base import KVHandle, KVSource
from distserve.transfer.blocks import RankBlocks
from distserve.transfer.layout import InstanceLayout
from distserve.transfer.memory import SharedMemory
from distserve.transfer.nixl import NixlSource, NixlTransport

SOURCE, TARGET = of((4, 2), 2, 2), of((4, 2), 1, 3)
BLOCKS, INTO = [4, 1, 2], [0, 5, 3]
ROOT = Path(__file__).parent.parent.parent


# -- what runs on the hosts -------------------------------------------------------------------------------------------


def allocate(layout: InstanceLayout) -> tuple[list[SharedMemory], RankBlocks]:
    memories = [
        SharedMemory(NUM_BLOCKS * layout.of_rank(rank).block_bytes) for rank in range(layout.sharding.num_ranks)
    ]
    return memories, RankBlocks([memory.buffer for memory in memories], NUM_BLOCKS, layout)


def run_source() -> None:
    """Says its handle, and holds the KV until its standard input ends."""
    memories, blocks = allocate(SOURCE)
    for memory, part in zip(blocks.ranks, cut(whole_kv(MODEL, NUM_BLOCKS), SOURCE), strict=True):
        memory[:] = part
    source = NixlSource(memories, NUM_BLOCKS, SOURCE, agent=agent.Agent(one_host=False))
    generations, digest = source.publish(BLOCKS)
    where = KVSource("prefill-0", 1, SOURCE, source.location, notices="")
    handle = KVHandle(where, 7, 1, len(BLOCKS) * MODEL.block_size, tuple(BLOCKS), generations, digest)
    print(msgspec.json.encode(handle).decode(), flush=True)
    sys.stdin.read()
    source.close()


async def run_target() -> None:
    """Pulls the handle that it reads, says whether every byte is right; at each further line pulls again, and says what
    came of it."""
    handle = msgspec.json.decode(sys.stdin.readline(), type=KVHandle)
    memories, blocks = allocate(TARGET)
    own = agent.Agent(one_host=False)
    transport = NixlTransport(memories, NUM_BLOCKS, TARGET, agent=own)
    await transport.connect(handle.source)
    await transport.pull(handle, INTO)
    parts = cut(whole_kv(MODEL, NUM_BLOCKS), TARGET)
    equal = all((memory[INTO] == part[BLOCKS]).all() for memory, part in zip(blocks.ranks, parts, strict=True))
    print("equal" if equal else "different", flush=True)
    for _ in sys.stdin:
        began = time.monotonic()
        try:
            await transport.pull(handle, INTO)
            print("pulled", flush=True)
        except PullError as error:
            print(error.reason, time.monotonic() - began, flush=True)
    transport.close()
    own.close()


# -- the hosts --------------------------------------------------------------------------------------------------------


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Names of two network namespaces with a cable between them."""
    names = f"distserve-a-{os.getpid()}", f"distserve-b-{os.getpid()}"
    with ExitStack() as stack:
        try:
            agent.require()
            for name in names:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "delete", name)
            ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
            for number, name in enumerate(names, 1):
                ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "cable")
                ip("-n", name, "link", "set", "cable", "up")
                ip("-n", name, "link", "set", "lo", "up")  # without it UCX waits for ever, even to begin
            subprocess.run(["ip", "netns", "exec", names[0], *ISOLATED, "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError, UsageError) as error:
            pytest.skip(f"no namespaces can be made here, or no NIXL: {error}")
        yield names


ISOLATED = ("unshare", "--pid", "--ipc", "--fork", "--kill-child")


@contextmanager
def on(host: str, role: str) -> Iterator[subprocess.Popen[str]]:
    command = ["ip", "netns", "exec", host, *ISOLATED, sys.executable, "-m", "tests.transfer.test_nixl_hosts", role]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("UCX_")}
    with subprocess.Popen(
        command, cwd=ROOT, env=kept, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def say(process: subprocess.Popen[str], line: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line.strip() + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


@pytest.mark.skipif(not (shutil.which("ip") and shutil.which("unshare")), reason="needs ip and unshare")
def test_kv_crosses_a_cable(hosts: tuple[str, str]) -> None:
    with on(hosts[0], "source") as source, on(hosts[1], "target") as target:
        assert source.stdout is not None
        handle = source.stdout.readline()
        assert say(target, handle) == "equal"
        assert say(target, "again") == "pulled"
        source.kill()
        source.wait()
        reason, seconds = say(target, "again").split()
        assert reason == "gone"
        assert float(seconds) < 2


if __name__ == "__main__":
    if sys.argv[1] == "source":
        run_source()
    else:
        asyncio.run(run_target())
