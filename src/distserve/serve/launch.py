"""The one place that names implementations: from what the user asked for to processes, and in a process to its parts.

`serve` runs the gateway; `python -m distserve.serve.launch` is an instance's process (started by the gateway only).
Each imports what it needs when it needs it: the gateway must stay small, an instance must start quickly.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from distserve.plan import Plan, Role, default_plan
from distserve.ranks import RankProcess, as_rank, end_ranks, fork_ranks, spawn_ranks
from distserve.sched.base import Scheduler
from distserve.sched.blocks import BlockPool
from distserve.serve import eventloop
from distserve.serve.config import InstanceConfig, decode_config
from distserve.serve.fleet import Start
from distserve.serve.forkserver import main as fork_server
from distserve.serve.options import DEMO_MODEL, ServeOptions
from distserve.serve.process import Parts, SharingExecutor, live
from distserve.specs import ModelSpec

if TYPE_CHECKING:
    from distserve.engine.loaded import LoadedModel
    from distserve.transfer.base import Source, Transport
    from distserve.transfer.memory import SharedMemory

log = logging.getLogger(__name__)

RANK = (sys.executable, "-m", "distserve.serve.launch", "rank")  # a rank in an interpreter of its own
WARM_KV = 64 << 20  # bytes of an instance's KV memory that are taken before the first request needs them

BANNER = """
distserve is ready at {url}  (model {model}; {instances})

Ask it something:

  curl {url}/v1/chat/completions -H 'content-type: application/json'{curl_key} \\
    -d '{{"messages": [{{"role": "user", "content": "What is the capital of France?"}}]}}'

or from Python (pip install openai):

  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key="{key}")
  question = [{{"role": "user", "content": "What is the capital of France?"}}]
  print(client.chat.completions.create(model="{model}", messages=question).choices[0].message.content)

Metrics: {url}/metrics    Health: {url}/health    API: {url}/docs    Stop: Ctrl-C
"""


# -- the gateway's process --------------------------------------------------------------------------------------------


def serve(options: ServeOptions) -> int:
    """Serves until a signal; returns the exit status. Raises `UsageError` for everything that the user can mend."""
    from distserve.engine import hub
    from distserve.engine.fake import parse_fake
    from distserve.engine.parallel import check_degrees
    from distserve.serve.deployment import starts
    from distserve.serve.server import bind

    logging.basicConfig(level=options.log_level.upper(), format="%(levelname)s %(message)s", stream=sys.stderr)
    plan = Plan.load(options.plan) if options.plan else default_plan()
    model = options.model or plan.model or DEMO_MODEL
    if options.transport == "nixl":
        from distserve.transfer.agent import require

        require()
    if plan.machine is not None and plan.model is not None and not hub.same(model, plan.model):
        log.warning(
            "the plan was chosen by what steps of %s cost: unless %s is of the same shape, plan again for it",
            plan.model,
            model,
        )
    with bind(options.host, options.port) as listener:
        path = hub.resolve(DEMO_MODEL if is_fake(model) else model)
        spec = hub.read_spec(path)
        for instances in plan.instances:
            if is_fake(model):
                parse_fake(model).sharding(instances.tp, instances.pp)
            else:
                check_degrees(spec, instances.tp, instances.pp)
        found = starts(options, plan, model if is_fake(model) else str(path), spec)
        names = options.served_model_names or (model,)
        eventloop.run(_serve(options, names, str(path), spec, found, listener))
    return 0


def is_fake(model: str) -> bool:
    """`fake` or `fake:step=0.005,token=0.0001`: everything is real but the model, to measure and test what is around
    it. It has the demo model's tokenizer."""
    return model == "fake" or model.startswith("fake:")


async def _serve(
    options: ServeOptions, names: Sequence[str], path: str, spec: ModelSpec, found: list[Start], listener: socket.socket
) -> None:
    from distserve.engine import hub
    from distserve.sched.policy import AdmissionPolicy
    from distserve.sched.router import Router
    from distserve.serve.fleet import Fleet
    from distserve.serve.gateway import Gateway
    from distserve.serve.http.api import ApiOptions, build_app
    from distserve.serve.http.tokens import load_tokenizer
    from distserve.serve.record import recording
    from distserve.serve.server import LoadingDisplay, Server
    from distserve.serve.steplog import folder
    from distserve.serve.telemetry import Telemetry

    display = LoadingDisplay([start.name for start in found])
    telemetry = Telemetry(names[0])
    fleet = Fleet(found, display.show)
    admission = AdmissionPolicy(max_requests=options.max_queue) if options.max_queue else AdmissionPolicy()
    context = options.max_model_len or spec.max_model_len
    if options.record_steps is not None:
        folder(options.record_steps)
    record = recording(options.record, options.record_size, clock=time.monotonic)
    gateway = Gateway(
        fleet.remotes, Router(admission), telemetry, time.monotonic, max_model_len=context, ended=record.note
    )
    fleet.on_change = gateway.changed
    fleet.observe(telemetry)
    await fleet.start()
    try:
        tokenizer = await asyncio.to_thread(load_tokenizer, path)
        api = ApiOptions(
            models=tuple(names),
            version=version("distserve"),
            root=path,
            api_keys=options.api_keys,
            metrics=telemetry.render,
            sampling_defaults=hub.sampling_defaults(Path(path)),
        )
        server = Server(build_app(gateway, tokenizer, api), listener, fleet, gateway, options.shutdown_timeout)
        await server.run(_banner(options, names[0], found, listener), display)
    finally:
        display.close()
        await fleet.stop()
        record.close()


def _banner(options: ServeOptions, model: str, found: list[Start], listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    url = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else f'[{host}]' if ':' in host else host}:{port}"
    return BANNER.format(
        url=url,
        model=model,
        instances=", ".join(start.name for start in found),
        curl_key=" -H 'authorization: Bearer $DISTSERVE_API_KEY'" if options.api_keys else "",
        key="YOUR-KEY" if options.api_keys else "none",
    )


# -- an instance's process --------------------------------------------------------------------------------------------


class _Weights:
    """What a fork server has for its forks: the weights, or for instances of several ranks the means to load them."""

    def __init__(self) -> None:
        self.model: LoadedModel | None = None

    def preload(self, config: InstanceConfig, progress: Callable[[float, str], None]) -> None:
        if has_ranks(config):
            import distserve.engine.worker  # noqa: F401  # and with it all of torch that a rank needs
        elif not is_fake(config.engine.model):
            from distserve.engine.loaded import load

            self.model = load(config.engine, progress)

    def live(self, config: InstanceConfig) -> int:
        if not has_ranks(config):
            return live(config, partial(_build, self.model, []))
        ranks = fork_ranks(config.engine.num_ranks, _rank)
        return ranks if isinstance(ranks, int) else _drive(config, ranks)


def has_ranks(config: InstanceConfig) -> bool:
    """It computes in processes of their own."""
    return config.engine.num_ranks > 1 and not is_fake(config.engine.model)


def _rank(end: socket.socket, side: socket.socket) -> int:
    """A rank's life."""
    from distserve.engine import worker
    from distserve.transfer.memory import attach

    return worker.main(end, side, partial(attach, writable=True))


def _drive(config: InstanceConfig, ranks: list[RankProcess], life_line: BinaryIO | None = None) -> int:
    """The life of an instance that has `ranks`; they end with it."""
    try:
        return live(config, partial(_build, None, ranks), life_line)
    finally:
        end_ranks(ranks)


def _main() -> int:
    """An instance in an interpreter of its own."""
    config = decode_config(sys.stdin.buffer.readline())
    ranks = spawn_ranks(config.engine.num_ranks, RANK) if has_ranks(config) else []
    return _drive(config, ranks, sys.stdin.buffer)


async def _build(
    model: LoadedModel | None,
    ranks: list[RankProcess],
    config: InstanceConfig,
    progress: Callable[[float, str], None],
) -> Parts:
    """The executor, started; then the scheduler and transport of the role over its KV memory."""
    from distserve.engine.measure import measure_knee
    from distserve.transfer.layout import InstanceLayout
    from distserve.transfer.memory import SharedMemory

    memories: list[SharedMemory] = []

    def allocate(size: int) -> SharedMemory:
        memories.append(SharedMemory(size))
        return memories[-1]

    executor = _executor(config, model, ranks, allocate)
    await executor.start(progress)
    for memory in memories:
        memory.touch(WARM_KV // len(memories))
    size = executor.num_blocks
    knee = config.max_batch_tokens
    if knee is None and config.role is not Role.DECODE:
        progress(0.95, "measuring the knee")
        knee = await measure_knee(executor)
        log.info("the knee is %d tokens: prompts are batched up to it", knee)
    whole = executor.layout
    layout = InstanceLayout(executor.sharding, whole.head_dim, whole.block_size, whole.dtype)
    source, puller = await _transfer(config.transport)
    publisher = source(memories, size, layout, executor.export_blocks)
    transport = puller(memories, size, layout, executor.import_blocks) if config.role is Role.DECODE else None
    pool = BlockPool(size, executor.block_size, publisher.generations)
    return Parts(_scheduler(config, pool, knee), executor, publisher, transport, layout)


async def _transfer(transport: str) -> tuple[Callable[..., Source], Callable[..., Transport]]:
    """The two sides of a transport by its name; each takes the memories of the ranks, the number of blocks, the layout
    and what moves blocks to and from the devices."""
    if transport == "nixl":
        from distserve.transfer.agent import Agent
        from distserve.transfer.nixl import NixlSource, NixlTransport

        agent = await asyncio.to_thread(Agent, one_host=True)
        return partial(NixlSource, agent=agent), partial(NixlTransport, agent=agent)
    from distserve.transfer.shm import ShmSource, ShmTransport

    return ShmSource, ShmTransport


def _executor(
    config: InstanceConfig,
    model: LoadedModel | None,
    ranks: list[RankProcess],
    allocate: Callable[[int], SharedMemory],
) -> SharingExecutor:
    if is_fake(config.engine.model):
        from distserve.engine.fake import FakeExecutor, parse_fake

        fake = parse_fake(config.engine.model)
        buffer = lambda size: allocate(size).buffer  # noqa: E731
        return FakeExecutor(config.engine, fake, kv_buffer_factory=buffer, verify=fake.writes_kv)
    if ranks:
        from distserve.engine.group import GroupExecutor

        rendezvous = Path(f"{config.notices}.ranks")  # in the gateway's folder, which goes with the gateway
        return GroupExecutor(
            config.engine,
            ranks,
            lambda size: allocate(size).path,
            rendezvous,
            name=config.name,
            log_level=config.log_level,
        )
    from distserve.engine.executor import LocalExecutor

    return LocalExecutor(config.engine, lambda size: allocate(size).buffer, model)


def _scheduler(config: InstanceConfig, pool: BlockPool, knee: int | None) -> Scheduler:
    from distserve.sched.roles import Policies, scheduler_for

    policies = Policies(config.prefill, config.decode, config.colocated)
    return scheduler_for(
        config.role, pool, policies, policy=config.policy, batch_tokens=knee, max_in_flight=config.engine.pp
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["fork-server"]:
        weights = _Weights()
        sys.exit(fork_server(weights.preload, weights.live))
    if sys.argv[1:2] == ["rank"]:
        sys.exit(as_rank(sys.argv[2], sys.argv[3], _rank))
    sys.exit(_main())
