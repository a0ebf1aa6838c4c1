"""The gateway of the protocol test: the states of an attempt, deadlines, audits, retries. Routing is the real router's.

ADMITTED -> PREFILLING -> HANDED_OFF -> DECODING -> DONE
      \\__________\\____________\\____________\\-> RETRY (next attempt) or FAILED
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.sched.toy_world import TIMER, Event, Handle, Key, Submit, World, token_of

from distserve.sched.base import Load
from distserve.sched.policy import AdmissionPolicy
from distserve.sched.router import Candidate, Router

DEADLINE = 12.0  # seconds without a sign of an attempt; far above what a step or a pull takes here
RESTART_DEADLINE = 15.0
MAX_ATTEMPTS = 12


@dataclass
class Call:
    """A request, and what its client was told."""

    id: int
    num_prompt: int
    last: int  # tokens of the whole answer; only the executor looks at it
    output: list[int] = field(default_factory=list)  # what the client was given
    told: list[str] = field(default_factory=list)  # the one end it was told
    attempt: int = 1
    state: str = "ADMITTED"
    prefill: tuple[str, int] | None = None  # name and epoch of who computes or holds the prompt
    decode: tuple[str, int] | None = None
    handle: Handle | None = None  # not pulled yet, as far as the gateway knows
    early: dict[int, Event] = field(default_factory=dict)  # tokens that overtook others
    sign: float = 0.0  # when it last moved on

    @property
    def key(self) -> Key:
        return self.id, self.attempt


class Gateway:
    def __init__(self, world: World, policy: AdmissionPolicy) -> None:
        self.world = world
        self.router = Router(policy)
        self.calls: dict[int, Call] = {}
        self.over: list[Call] = []
        self.ends: dict[Key, str] = {}  # invariant 5: how each attempt ended
        self.up: dict[str, tuple[int, str, Load]] = {}  # epoch, role, last load
        self.dead = False
        world.at(TIMER, self.timer)

    # Instances come and go

    def ready(self, name: str, epoch: int, role: str) -> None:
        self.up[name] = (epoch, role, Load(num_free_blocks=1, num_blocks=1))
        for call in list(self.calls.values()):
            self.advance(call)

    def gone(self, name: str, epoch: int) -> None:
        """The connection closed, or it was fenced."""
        if self.up.get(name, (0,))[0] == epoch:
            del self.up[name]
        for call in list(self.calls.values()):
            if call.decode == (name, epoch) and call.handle is not None:
                call.decode, call.state = None, "HANDED_OFF"
                self.world.seen["hand-off offered to another decode"] += 1
                self.advance(call)
            elif call.decode == (name, epoch) or (call.prefill == (name, epoch) and not self.is_pulled(call)):
                self.retry(call, "instance gone")

    def is_pulled(self, call: Call) -> bool:
        return call.state == "DECODING" and call.handle is None

    # A request's way

    def arrive(self, id: int, num_prompt: int, last: int) -> None:
        if self.dead:
            return
        call = Call(id, num_prompt, last)
        admission = self.router.admit(
            num_prompt, self.candidates("prefill", "colocated"), num_requests=len(self.calls), mean_seconds=1.0
        )
        if admission.retry_after is not None:
            assert admission.retry_after > 0
            self.world.seen["refused"] += 1
            call.told.append("refused")
            self.over.append(call)
            return
        self.calls[id] = call
        call.sign = self.world.now
        self.advance(call)

    def advance(self, call: Call) -> None:
        """Sends it to whoever is next, where somebody is there."""
        if call.state == "ADMITTED":
            roles = ["colocated", *(["prefill"] if self.candidates("decode") else [])]
            candidates = self.candidates(*roles)
            if not candidates and call.attempt > 1:
                candidates = self.candidates("decode")  # it can compute what it cannot pull
            name = self.router.pick_prefill(call.num_prompt, candidates)
            if name is not None:
                call.state = "PREFILLING" if self.up[name][1] == "prefill" else "DECODING"
                call.prefill = self.submit(call, name, None)
                call.decode = None if call.state == "PREFILLING" else call.prefill
        elif call.state == "HANDED_OFF":
            name = self.router.pick_decode(call.num_prompt, self.candidates("decode"))
            if name is not None:
                call.state = "DECODING"
                call.decode = self.submit(call, name, call.handle)

    def submit(self, call: Call, name: str, handle: Handle | None) -> tuple[str, int]:
        call.sign = self.world.now
        place = name, self.up[name][0]
        self.tell(place, "submit", Submit(call.key, call.num_prompt, len(call.output), call.last, handle))
        return place

    def leave(self, id: int) -> None:
        """The client goes away."""
        call = self.calls.get(id)
        if call is not None and not self.dead:
            self.world.seen[f"client left while {call.state}"] += 1
            self.let_go(call)
            self.end(call, "FAILED")
            call.told.append("left")
            self.finish(call)
            faults = self.world.faults
            if not (faults.loss or faults.late or faults.hangs or faults.slow):
                self.world.at(1.0, self.check_gone, id)

    def check_gone(self, id: int) -> None:
        for instance in self.world.instances.values():
            keys = [live.submit.key for live in instance.live.values()]
            assert id not in {key[0] for key in keys}, f"{instance.name} works for a client that left a second ago"

    def retry(self, call: Call, why: str) -> None:
        self.let_go(call)
        if call.attempt == MAX_ATTEMPTS:
            self.fail(call)
            return
        self.world.seen[f"retry: {why}"] += 1
        self.end(call, "RETRY")
        call.attempt += 1
        call.state, call.prefill, call.decode, call.handle = "ADMITTED", None, None, None
        call.early.clear()
        call.sign = self.world.now
        self.advance(call)

    def fail(self, call: Call) -> None:
        self.world.seen["failed"] += 1
        self.end(call, "FAILED")
        call.told.append("error")
        self.finish(call)

    def let_go(self, call: Call) -> None:
        for place in dict.fromkeys((call.prefill, call.decode)):  # in this order: a seed replays exactly
            if place is not None:
                self.tell(place, "abort", call.key)

    def end(self, call: Call, how: str) -> None:
        assert call.key not in self.ends, f"attempt {call.key} ended as {self.ends[call.key]} and as {how}"
        self.ends[call.key] = how

    def finish(self, call: Call) -> None:
        del self.calls[call.id]
        self.over.append(call)

    # What instances say

    def receive(self, name: str, epoch: int, kind: str, what: Any, load: Load) -> None:
        if self.dead:
            return
        if name not in self.up or self.up[name][0] != epoch:
            self.world.seen["gateway ignored a message of an epoch that is over"] += 1
            return
        self.up[name] = (epoch, self.up[name][1], load)
        if kind == "events":
            for event in what:
                self.on_event((name, epoch), event)
        elif kind == "pulled":
            if (call := self.find(what)) is not None and call.decode == (name, epoch):
                call.handle, call.sign = None, self.world.now
        elif kind == "failure":
            if (call := self.find(what)) is not None and call.decode == (name, epoch):
                self.retry(call, "pull failed")
        elif kind == "unknown":
            for key in what:
                self.on_unknown((name, epoch), key)

    def on_event(self, place: tuple[str, int], event: Event) -> None:
        call = self.find(event.key)
        if call is None:
            return
        if event.number < len(call.output):
            assert call.output[event.number] == event.token, "another token at the same place"
            self.world.seen["token came twice"] += 1
            return
        if place == call.decode:
            call.handle = None  # who generates has pulled
        call.early[event.number] = event
        while (event_now := call.early.pop(len(call.output), None)) is not None:
            call.output.append(event_now.token)
            call.sign = self.world.now
            if event_now.finish:
                self.end(call, "DONE")
                call.told.append("done")
                if call.prefill != call.decode and call.prefill is not None:
                    self.tell(call.prefill, "release", call.key)
                self.finish(call)
                return
            if event_now.handle is not None and call.state == "PREFILLING":
                call.state, call.handle = "HANDED_OFF", event_now.handle
                self.advance(call)

    def on_unknown(self, place: tuple[str, int], key: Key) -> None:
        call = self.find(key)
        if call is None:
            return
        waits = call.handle is not None or call.state == "PREFILLING"
        if place == call.decode or (place == call.prefill and waits):
            self.retry(call, "instance knows nothing of it")

    def find(self, key: Key) -> Call | None:
        call = self.calls.get(key[0])
        if call is None or call.attempt != key[1]:
            self.world.seen["gateway ignored word of an attempt that is over"] += 1
            return None
        return call

    # Time

    def timer(self) -> None:
        """Deadlines; and each instance is told what is believed to be there (this renews leases and finds orphans)."""
        if self.dead:
            return
        now = self.world.now
        for call in list(self.calls.values()):
            idle = call.state == "ADMITTED" or (call.state == "HANDED_OFF" and call.decode is None)
            if idle and now - call.sign > RESTART_DEADLINE:
                self.let_go(call)
                self.fail(call)
            elif not idle and now - call.sign > DEADLINE:
                self.retry(call, "deadline")
        for name, (epoch, _, _) in self.up.items():
            place = name, epoch
            believed = {
                call.key
                for call in self.calls.values()
                if call.decode == place or (call.prefill == place and not self.is_pulled(call))
            }
            self.tell(place, "audit", believed)
        self.world.at(TIMER, self.timer)

    def die(self) -> None:
        self.dead = True
        for call in list(self.calls.values()):
            self.end(call, "FAILED")
            call.told.append("connection closed")
            self.finish(call)

    def tell(self, place: tuple[str, int], kind: str, what: Any) -> None:
        name, epoch = place
        self.world.send("gateway", name, self.world.instances[name].receive, epoch, kind, what)

    def candidates(self, *roles: str) -> list[Candidate]:
        return [Candidate(name, load) for name, (_, role, load) in self.up.items() if role in roles]


def check_answer(call: Call) -> None:
    """Invariants 5 and 6 as the client sees them."""
    assert len(call.told) == 1, f"request {call.id} was told {call.told}"
    expected = [token_of(call.id, number) for number in range(call.last)]
    assert call.output == expected[: len(call.output)], f"request {call.id}: wrong tokens"
    if call.told == ["done"]:
        assert call.output == expected, f"request {call.id} lacks tokens"
