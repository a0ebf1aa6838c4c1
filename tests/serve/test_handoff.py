"""A request through gateway, drivers, schedulers and transport: the good way, and what protocol faults do to it."""

from __future__ import annotations

import asyncio
import random

import pytest
from tests.serve.rig import BLOCK, Rig, disaggregated

from distserve.engine.fake import TINY_LAYOUT
from distserve.errors import InstanceError, OverloadedError, RequestError, UnavailableError
from distserve.plan import Role
from distserve.request import FinishReason
from distserve.sched.policy import AdmissionPolicy
from distserve.serve.gateway import GatewayLimits
from distserve.serve.messages import Abort, Audit, Release, Renew, Step, Submit
from distserve.specs import KVLayout

COLOCATED = {"colocated-0": Role.COLOCATED}
# Any degrees on either side: 5 layers in up to 3 stages, 2 KV heads that up to 4 ranks share.
SHARED = KVLayout(num_layers=5, num_kv_heads=2, head_dim=4, block_size=BLOCK, dtype="float32")


async def expected(num_prompt: int, max_tokens: int, seed: int) -> list[int]:
    async with Rig(COLOCATED) as rig:
        return await rig.answer(num_prompt, max_tokens, seed)


async def test_disaggregated_gives_the_tokens_of_colocated() -> None:
    async with Rig(disaggregated()) as rig:
        for num_prompt, max_tokens, seed in ((1, 1, 0), (1, 40, 1), (100, 1, 2), (130, 70, 3), (16, 17, 4)):
            assert await rig.answer(num_prompt, max_tokens, seed) == await expected(num_prompt, max_tokens, seed)
        await rig.idle()
        assert rig.metric("distserve:handoffs_total") == 3  # two requests ended with prefill's token


async def test_a_burst_beyond_decode_memory_waits_in_prefill_memory() -> None:
    async with Rig(disaggregated(), num_blocks=128, decode_blocks=10) as rig:
        answers = await asyncio.gather(*(rig.answer(60, 20, seed) for seed in range(30)))
        for seed in (0, 17, 29):
            assert answers[seed] == await expected(60, 20, seed)
        await rig.idle()
        assert rig.metric("distserve:request_retries_total", reason="PullError") == 0


async def test_preemption_costs_time_only() -> None:
    async with Rig(disaggregated(), decode_blocks=12) as rig:  # 8 sequences of 5 blocks each grow into 12
        answers = await asyncio.gather(*(rig.answer(20, 60, seed) for seed in range(8)))
        assert rig.nodes["decode-0"].remote.load().num_preemptions > 0
        assert answers == [await expected(20, 60, seed) for seed in range(8)]
        await rig.idle()


async def test_what_could_never_fit_is_refused() -> None:
    async with Rig(disaggregated(), decode_blocks=4) as rig:
        assert rig.gateway.max_kv_tokens == 64
        with pytest.raises(RequestError, match="shorten"):
            await rig.answer(200, 5)
        await rig.idle()


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
async def test_an_instance_that_dies_is_replaced_without_a_trace_in_the_answer(victim: str) -> None:
    async with Rig(disaggregated(2, 2), seconds=0.002) as rig:
        answers = [asyncio.create_task(rig.answer(50, 60, seed)) for seed in range(12)]
        await asyncio.sleep(0.05)
        await rig.kill(victim)
        found = await asyncio.gather(*answers)
        assert found == [await expected(50, 60, seed) for seed in range(12)]
        await rig.idle()


async def test_requests_wait_for_the_only_decode_to_come_back() -> None:
    async with Rig(disaggregated(), seconds=0.002) as rig:
        answers = [asyncio.create_task(rig.answer(30, 40, seed)) for seed in range(4)]
        await asyncio.sleep(0.03)
        await rig.kill("decode-0")
        assert not rig.gateway.ready()
        assert rig.gateway.status()["missing"] == ["decode"]
        with pytest.raises(UnavailableError, match="decode"):
            await rig.answer(5, 5)
        await rig.restart("decode-0")
        assert await asyncio.gather(*answers) == [await expected(30, 40, seed) for seed in range(4)]
        await rig.idle()


async def test_held_kv_is_offered_to_another_decode() -> None:
    """Decode dies before its pull: the prompt is not computed again."""
    async with Rig(disaggregated(1, 2)) as rig:
        submitted: list[int] = []
        first = asyncio.Event()

        def lose_first_decode(message: object) -> int:
            if isinstance(message, Submit) and message.handle is not None:
                submitted.append(message.epoch)
                first.set()
                return len(submitted) > 1
            return 1

        rig.to_instance = lose_first_decode
        answer = asyncio.create_task(rig.answer(50, 10, 1))
        await first.wait()
        await rig.kill(next(name for name, node in rig.nodes.items() if node.remote.epoch == submitted[0]))
        assert await answer == await expected(50, 10, 1)
        assert len(submitted) == 2
        assert sum(rig.metric("distserve:request_retries_total", reason=r) for r in ("InstanceGone", "StaleError")) == 0
        await rig.idle()


async def test_damaged_kv_is_counted_and_computed_again_never_answered() -> None:
    async with Rig(disaggregated()) as rig:
        damaged = 0

        def damage(message: object) -> int:
            nonlocal damaged
            if isinstance(message, Submit) and message.handle is not None and damaged < 1:
                damaged += 1
                memory = rig.nodes["prefill-0"].memory
                assert memory is not None
                block_bytes = message.handle.source.layout.of_rank(0).block_bytes
                memory.buffer[message.handle.blocks[1] * block_bytes + 5] ^= 0x40
            return 1

        rig.to_instance = damage
        assert await rig.answer(50, 20, 7) == await expected(50, 20, 7)
        assert damaged == 1
        assert rig.metric("distserve:digest_failures_total") == 1
        assert rig.metric("distserve:request_retries_total", reason="PullError") == 1
        await rig.idle()


async def test_a_lease_that_ends_during_the_wait_is_noticed_by_the_generation() -> None:
    """Without audits and word from decode nobody renews: prefill frees the blocks, others take them, and the late pull
    must see that."""
    async with Rig(disaggregated(), decode_blocks=5, lease=0.05, seconds=0.003) as rig:
        rig.to_instance = lambda message: 0 if isinstance(message, Audit) else 1
        rig.notices = lambda message: 0 if isinstance(message, Renew) else 1
        found = await asyncio.gather(*(rig.answer(60, 12, seed) for seed in range(4)), return_exceptions=True)
        right = [await expected(60, 12, seed) for seed in range(4)]
        # The queue moves so slowly that some give up; whoever was answered was answered right.
        assert all(
            answer == good or isinstance(answer, InstanceError) for answer, good in zip(found, right, strict=True)
        )
        assert rig.metric("distserve:pull_failures_total", reason="generation") > 0
        await rig.idle()


async def test_a_request_that_waits_to_be_pulled_keeps_its_lease_without_the_gateway() -> None:
    """The queue of the decode side is longer than a lease, no audit arrives: its own word is enough."""
    async with Rig(disaggregated(), decode_blocks=5, lease=0.3, seconds=0.01) as rig:
        rig.to_instance = lambda message: 0 if isinstance(message, Audit) else 1
        found = await asyncio.gather(*(rig.answer(60, 12, seed) for seed in range(4)))
        assert found == [await expected(60, 12, seed) for seed in range(4)]
        assert rig.metric("distserve:pull_failures_total", reason="generation") == 0
        rig.to_instance = lambda message: 1
        await rig.idle()


@pytest.mark.parametrize("kind", [Submit, Step, Abort, Release])
async def test_lost_messages_are_healed_by_the_audit(kind: type) -> None:
    async with Rig(disaggregated(), seconds=0.001) as rig:
        rng = random.Random(5)

        def lossy(message: object) -> int:
            return int(not isinstance(message, kind) or rng.random() > 0.05)

        rig.to_instance = rig.to_gateway = lossy
        found = await asyncio.gather(*(rig.answer(20, 8, seed) for seed in range(20)), return_exceptions=True)
        rig.to_instance = rig.to_gateway = lambda message: 1
        for seed, answer in enumerate(found):
            assert isinstance(answer, InstanceError) or answer == await expected(20, 8, seed)
        await rig.idle()


async def test_doubled_messages_change_nothing() -> None:
    async with Rig(disaggregated(2, 2), seconds=0.001) as rig:
        rig.to_instance = lambda message: 1 if isinstance(message, Step) else 2
        rig.notices = lambda message: 2
        found = await asyncio.gather(*(rig.answer(40, 30, seed) for seed in range(12)))
        assert found == [await expected(40, 30, seed) for seed in range(12)]
        await rig.idle()


async def test_a_lost_pulled_notice_frees_the_blocks_all_the_same() -> None:
    async with Rig(disaggregated(), lease=30.0) as rig:
        rig.notices = lambda message: 0
        assert await rig.answer(40, 30, 1) == await expected(40, 30, 1)
        await rig.idle()


async def test_a_client_that_leaves_frees_everything_at_every_step() -> None:
    async with Rig(disaggregated(), num_blocks=32, decode_blocks=16, seconds=0.001) as rig:

        async def leave_after(seed: int, num_tokens: int) -> None:
            stream = rig.gateway.generate(rig.request(30, 30, seed))
            seen = 0
            async for tokens in stream:
                seen += len(tokens)
                if seen >= num_tokens:
                    break
            stream.close()

        async def leave_before(seed: int, delay: float) -> None:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(delay):
                    await rig.answer(30, 400, seed)

        early = [leave_before(seed, 0.0005 * (seed % 40)) for seed in range(200)]
        await asyncio.gather(*early, *(leave_after(seed, 1 + seed % 20) for seed in range(100)))
        await rig.idle(1.0)  # within a second


async def test_an_answer_cut_at_a_stop_string_counts_as_stopped_not_as_aborted() -> None:
    async with Rig(disaggregated()) as rig:
        for finish in (FinishReason.STOP, None, FinishReason.STOP):
            stream = rig.gateway.generate(rig.request(30, 400))
            seen = [len(await anext(stream)) for _ in range(3)]
            stream.close(finish)
            stream.close()  # says nothing new
            assert sum(seen) == len(stream.request.output)
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
        await rig.idle(1.0)
        assert rig.metric("vllm:request_success_total", finished_reason="stop") == 2
        assert rig.metric("vllm:request_success_total", finished_reason="abort") == 1
        assert rig.metric("vllm:request_generation_tokens_count") == 2


async def test_what_cannot_be_admitted_is_refused_at_once_with_a_computed_time() -> None:
    async with Rig(disaggregated(), seconds=0.005, admission=AdmissionPolicy(max_requests=4)) as rig:
        running = [asyncio.create_task(rig.answer(20, 40, seed)) for seed in range(4)]
        await asyncio.sleep(0.02)
        with pytest.raises(OverloadedError) as caught:
            await rig.answer(20, 40)
        assert 0 < caught.value.retry_after < 60
        assert [len(answer) for answer in await asyncio.gather(*running)] == [40] * 4
        assert len(await rig.answer(20, 4)) == 4
        await rig.idle()


async def test_the_door_closes_and_what_runs_goes_on() -> None:
    async with Rig(disaggregated(), seconds=0.005) as rig:
        running = asyncio.create_task(rig.answer(20, 40, 3))
        await asyncio.sleep(0.02)
        rig.gateway.close_door()
        with pytest.raises(UnavailableError, match="shutting down"):
            await rig.answer(5, 5)
        assert await running == await expected(20, 40, 3)


async def test_drained_instances_take_no_new_work_and_finish_theirs() -> None:
    async with Rig(disaggregated(1, 2), seconds=0.002) as rig:
        running = [asyncio.create_task(rig.answer(20, 60, seed)) for seed in range(6)]
        await asyncio.sleep(0.03)
        async with asyncio.timeout(10):
            await rig.nodes["decode-0"].remote.drain()
        assert rig.nodes["decode-0"].remote.num_requests == 0
        await asyncio.gather(*running)
        await rig.idle()


async def test_gives_up_after_so_many_attempts_and_says_why() -> None:
    async with Rig(disaggregated(), limits=GatewayLimits(max_attempts=2, restart_deadline=1.0)) as rig:
        rig.to_instance = lambda message: 0 if isinstance(message, Submit) else 1
        with pytest.raises(InstanceError, match="after 2 attempts"):
            await rig.answer(10, 5)
        await rig.idle()


@pytest.mark.parametrize("seed", range(6))
async def test_chaos_never_changes_an_answer_and_never_leaks(seed: int) -> None:
    """Seeded kills, restarts, losses, doubles, damage and departures over a mixed fleet; odd seeds: of any degrees."""
    rng = random.Random(seed)
    roles = disaggregated(2, 2) | COLOCATED
    shared = {name: rng.choice([(1, 1), (2, 1), (1, 3), (2, 2), (4, 3)]) for name in roles} if seed % 2 else {}
    rig = Rig(
        roles,
        num_blocks=40,
        decode_blocks=24,
        seconds=0.001,
        limits=GatewayLimits(12, 10.0),
        degrees=shared,
        layout=SHARED if shared else TINY_LAYOUT,
    )
    async with rig:

        def faulty(message: object) -> int:
            return 0 if rng.random() < 0.002 else 2 if rng.random() < 0.01 and not isinstance(message, Step) else 1

        rig.to_instance = rig.to_gateway = rig.notices = faulty

        async def client(number: int) -> None:
            num_prompt, max_tokens = rng.randint(1, 120), rng.randint(1, 60)
            await asyncio.sleep(rng.random() * 0.5)
            if rng.random() < 0.2:
                try:
                    async with asyncio.timeout(rng.random() * 0.1):
                        await rig.answer(num_prompt, max_tokens, number)
                except (TimeoutError, UnavailableError):
                    return
            try:
                answers[number] = (num_prompt, max_tokens, await rig.answer(num_prompt, max_tokens, number))
            except UnavailableError:
                return  # refused at the door while a phase was down

        async def gremlin() -> None:
            for _ in range(6):
                await asyncio.sleep(0.08)
                victim = rng.choice(list(rig.nodes))
                await rig.kill(victim)
                await asyncio.sleep(0.01)
                await rig.restart(victim)

        answers: dict[int, tuple[int, int, list[int]]] = {}
        await asyncio.gather(gremlin(), *(client(number) for number in range(80)))
        rig.to_instance = rig.to_gateway = rig.notices = lambda message: 1
        await rig.idle()
    assert len(answers) > 40
    for number, (num_prompt, max_tokens, answer) in answers.items():
        assert answer == await expected(num_prompt, max_tokens, number)


DEGREES = [((1, 1), (2, 3)), ((4, 1), (1, 2)), ((2, 3), (2, 2)), ((1, 2), (4, 3)), ((2, 2), (1, 1))]


@pytest.mark.parametrize(("prefill", "decode"), DEGREES, ids=str)
async def test_any_degrees_hand_over_to_any(prefill: tuple[int, int], decode: tuple[int, int]) -> None:
    degrees = {"prefill-0": prefill, "decode-0": decode}
    asked = [(60, 20), (1, 40), (130, 30), (17, 3), (90, 25), (33, 12)]
    async with Rig(disaggregated(), degrees=degrees, layout=SHARED, decode_blocks=24, seconds=0.0005) as rig:
        answers = await asyncio.gather(*(rig.answer(*lengths, seed) for seed, lengths in enumerate(asked)))
        assert rig.metric("distserve:handoffs_total") == len(asked)
        await rig.idle()
    assert answers == [await expected(*lengths, seed) for seed, lengths in enumerate(asked)]


async def test_deaths_between_instances_of_different_degrees_leave_no_trace() -> None:
    """Flights are cut off, pulls lose their source, and what was held is pulled by an instance of other degrees."""
    degrees = {"prefill-0": (4, 1), "prefill-1": (1, 3), "decode-0": (2, 2), "decode-1": (1, 1)}
    async with Rig(disaggregated(2, 2), degrees=degrees, layout=SHARED, seconds=0.001) as rig:
        answers = [asyncio.create_task(rig.answer(50, 40, seed)) for seed in range(16)]
        for victim in ("decode-0", "prefill-1", "decode-1", "prefill-0"):
            await asyncio.sleep(0.04)
            await rig.kill(victim)
            await rig.restart(victim)
        assert await asyncio.gather(*answers) == [await expected(50, 40, seed) for seed in range(16)]
        await rig.idle()


async def test_aborts_in_flight_free_their_blocks_when_the_flight_lands() -> None:
    degrees = {"colocated-0": (1, 3)}
    async with Rig(COLOCATED, degrees=degrees, layout=SHARED, seconds=0.003) as rig:
        streams = [rig.gateway.generate(rig.request(40, 200, seed)) for seed in range(8)]
        staying = asyncio.create_task(rig.answer(40, 30, 20))
        for stream in streams:
            await anext(aiter(stream))
        for stream in streams:
            stream.close()
        assert await staying == await expected(40, 30, 20)
        await rig.idle()
