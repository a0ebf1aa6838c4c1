"""What no deployment can do better than, said without simulating: the search leaves out what these rule out, and
nothing else may be left out for good. Knows costs in closed form, no scheduler.

**Work.** In steady state an instance is busy at most all the time, and serves at least the goal's share of what comes
(what it never serves meets nothing). So with `w` the least seconds of its busiest stage that a mean request can take,

    rate <= instances / (goal * w)

Prefill. A step of prompts takes, by any of its lines, base + per_token * sum(n) + per_square * sum(n^2), and holds at
most B sequences and max(Lm, longest prompt) tokens, so that a mean request shares its base with so many at most:

    w >= base * max(1 / B, E[n] / max(Lm, longest)) + per_token * E[n] + per_square * E[n^2]

Decode. A step of b sequences takes base + per_context * context + per_sequence * b. Its contexts fit the KV memory (T
tokens), and b <= B. Of a request's o - 1 steps with contexts c: at least (o - 1) / B steps' bases, and sum(c) / T:

    w >= base * max(E[o - 1] / B, E[sum(c)] / T) + per_context * E[sum(c)] + per_sequence * E[o - 1]

where a step's line depends on its batch, the least over all lines (each with the B up to which it holds): a mean over
steps of different lines is not below the least of them. The host prepares one batch at a time; where there is one stage
it does so while the device waits, so that its seconds are added to base and per_sequence.

Memory. A sequence keeps its KV for as long as its token takes through all stages, at least
pp * (stage(context C) + handover) + host = A + B * C in a batch of summed context C. All KV fits T at all times, so
that with K = rate * E[sum(c)] the context that is computed each second, and N steps each second,

    T  >=  sum over steps of C * (A + B * C)  >=  A * K + B * K^2 / N            (Cauchy-Schwarz)

and N <= (1 - stage's per_context * K) / stage's base, because a stage computes one batch at a time. What K solves is
the most. (With one stage this says the same as the line above; with several it says what their waits cost.)

Colocated. A mixed step is not shorter than its prompts' products alone, nor than its decodes alone: the larger of both;
and it takes the attention of both beside the products of its prompts:

    w >= per_token * E[n] + per_square * E[n^2] + per_context * E[sum(c)]

**Light load.** A request is never quicker than alone: a batch with it computes at least its own tokens and reads at
least its own context. Where fewer than the goal's share meet their targets alone, no rate is attained.

Measured points beside the formulas count with the least of them, and a machine's weather with its best moment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from distserve.costs.base import Costs
from distserve.costs.latency import DecodeLine, Latency
from distserve.plan import InstanceSpec, Role
from distserve.planner.demand import Demand
from distserve.traces import Arrival

_SAMPLE = 2000  # requests that light load is looked at for


@dataclass(frozen=True)
class Moments:
    """Means of a workload's lengths."""

    demand: Demand

    @cached_property
    def prompt(self) -> float:
        return self.demand.workload.mean_prompt_tokens

    @cached_property
    def prompt_squares(self) -> float:
        requests = self.demand.workload.arrivals
        return sum(r.prompt_tokens**2 for r in requests) / len(requests)

    @cached_property
    def longest_prompt(self) -> int:
        return max(r.prompt_tokens for r in self.demand.workload)

    @cached_property
    def longest(self) -> int:
        """Prompt and answer."""
        return max(r.prompt_tokens + r.output_tokens for r in self.demand.workload)

    @cached_property
    def steps(self) -> float:
        """Decode steps of a request."""
        return self.demand.workload.mean_output_tokens - 1

    @cached_property
    def contexts(self) -> float:
        """Their contexts, summed."""
        requests = self.demand.workload.arrivals
        steps = ((r.output_tokens - 1) * (r.prompt_tokens + r.output_tokens / 2) for r in requests)
        return sum(steps) / len(requests)

    @cached_property
    def sample(self) -> tuple[Arrival, ...]:
        """Every so many-th request by length, so that each application keeps its share."""
        ordered = sorted(self.demand.workload, key=lambda r: (r.app, r.prompt_tokens, r.output_tokens))
        return tuple(ordered[:: max(1, len(ordered) // _SAMPLE)])


class Bounds:
    """Of instances under one demand."""

    def __init__(self, costs: Costs, demand: Demand) -> None:
        self.moments = Moments(demand)
        self._costs = costs
        self._demand = demand
        self._most: dict[tuple[Role, int, int], float] = {}
        # Of what its costs say, the least that a step ever takes
        self._quickest = min([1.0, *(min(pace[1:]) for pace in costs.engine.weather.paces)])

    def fits(self, tp: int, pp: int) -> bool:
        """Whether the longest request's KV fits an instance."""
        engine = self._costs.engine
        return self._costs.kv_blocks(tp, pp) * engine.block_size >= self.moments.longest

    def most(self, spec: InstanceSpec) -> float:
        """Requests/s that one instance can attain the goal for at most; 0: not even one now and then."""
        key = (spec.role, spec.tp, spec.pp)
        if key not in self._most:
            latency = self._costs.latency(spec.tp, spec.pp)
            seconds = 0.0
            if spec.role is not Role.DECODE:
                seconds = self._prompt_seconds(latency, spec.role)
            if spec.role is not Role.PREFILL:
                seconds = max(seconds, self._decode_seconds(latency, spec), self._memory_seconds(latency, spec))
            if spec.role is Role.COLOCATED:
                seconds = max(seconds, self._mixed_seconds(latency))
            possible = self.alone(spec) >= self._demand.goal
            self._most[key] = 1 / (self._demand.goal * max(self._quickest * seconds, 1e-9)) if possible else 0.0
        return self._most[key]

    def alone(self, spec: InstanceSpec) -> float:
        """The share of requests that meet their targets on an idle instance; of the application that does worst."""
        latency = self._costs.latency(spec.tp, spec.pp)
        met: dict[str, list[bool]] = {}
        for request in self.moments.sample:
            slo = self._demand.targets.of(request.app)
            good = True
            if slo.ttft is not None and spec.role is not Role.DECODE:
                first = self._quickest * latency.prompts([request.prompt_tokens])
                good = self._costs.engine.request + first <= slo.ttft
            if good and slo.tpot is not None and request.output_tokens > 1 and spec.role is not Role.PREFILL:
                good = self.token_alone(latency, request) <= slo.tpot
            met.setdefault(request.app, []).append(good)
        return min(sum(mine) / len(mine) for mine in met.values())

    def token_alone(self, latency: Latency, request: Arrival) -> float:
        """Least mean seconds of a decode step of it: its mean context, with whatever batch is quickest."""
        context = request.prompt_tokens + request.output_tokens / 2
        return self._quickest * min(latency.decodes(line.from_batch, context) for line in latency.coefficients.decode)

    def stay(self, spec: InstanceSpec) -> float:
        """Seconds that a mean request stays in an instance under load, about: between alone and as long as its targets
        allow (four times as long as alone, at most)."""
        latency, moments = self._costs.latency(spec.tp, spec.pp), self.moments
        mean = max(1, round(moments.prompt))
        prompt = latency.prompts([mean]) if spec.role is not Role.DECODE else 0.0
        alone = latency.decodes(1, moments.prompt + moments.steps / 2) * moments.steps
        slos = [self._demand.targets.of(app) for app in self._demand.apps]
        allowed = max(4.0 * alone if slo.tpot is None else slo.tpot * moments.steps for slo in slos)
        decode = math.sqrt(alone * min(4.0 * alone, max(alone, allowed))) if spec.role is not Role.PREFILL else 0.0
        return 4.0 * prompt + decode

    def _prompt_seconds(self, latency: Latency, role: Role) -> float:
        engine, moments = self._costs.engine, self.moments
        knee = latency.knee()
        if role is Role.PREFILL:
            tokens, sequences = engine.prefill_batch_tokens or knee, engine.prefill_batch_size
        else:
            tokens = max(engine.chunk_tokens or knee, engine.colocated_batch_tokens or knee, engine.decode_batch_size)
            sequences = engine.decode_batch_size
        tokens = max(tokens, moments.longest_prompt)
        shared = max(1 / sequences, moments.prompt / tokens)
        least = min([0.0, *(y for _, points in latency.coefficients.prefill_rest for _, y in points)])
        squares = min(line.per_square for line in latency.coefficients.prefill)
        return latency.share * max(
            max(0.0, line.base + least) * shared
            + line.per_token * moments.prompt
            + (line.per_square if role is Role.PREFILL else max(0.0, squares)) * moments.prompt_squares
            for line in latency.coefficients.prefill
        )

    def _decode_seconds(self, latency: Latency, spec: InstanceSpec) -> float:
        engine, moments, lines = self._costs.engine, self.moments, latency.coefficients.decode
        memory = self._costs.kv_blocks(spec.tp, spec.pp) * engine.block_size
        least = min([0.0, *(y for _, points in latency.coefficients.decode_rest for _, y in points)])
        found = []
        for at, line in enumerate(lines):
            until = lines[at + 1].from_batch - 1 if at + 1 < len(lines) else engine.decode_batch_size
            batch = min(until, engine.decode_batch_size)
            if at == 0 or line.from_batch <= engine.decode_batch_size:
                found.append(self._line_seconds(line, max(1, batch), memory, least))
        host = latency.decode_step
        steps = max(moments.steps / engine.decode_batch_size, moments.contexts / memory)
        prepared = host.per_step * steps + host.per_sequence * moments.steps
        computed = latency.share * min(found)
        return computed + prepared if latency.pp == 1 else max(computed, prepared)

    def _mixed_seconds(self, latency: Latency) -> float:
        moments, prefill = self.moments, latency.coefficients.prefill
        squares = max(0.0, min(line.per_square for line in prefill))
        context = min(line.per_context for line in latency.coefficients.decode)
        if latency.coefficients.prefill_rest or latency.coefficients.decode_rest:
            return 0.0  # what was measured beside the formulas may be less than they say
        token = max(line.per_token for line in prefill)
        return latency.share * (token * moments.prompt + squares * moments.prompt_squares + context * moments.contexts)

    def _memory_seconds(self, latency: Latency, spec: InstanceSpec) -> float:
        """Least seconds a request for which there is memory."""
        lines, host = latency.coefficients.decode, latency.decode_step
        memory = self._costs.kv_blocks(spec.tp, spec.pp) * self._costs.engine.block_size
        least = min([0.0, *(y for _, points in latency.coefficients.decode_rest for _, y in points)])
        base = latency.share * max(0.0, least + min(line.base + line.per_sequence * line.from_batch for line in lines))
        context = latency.share * min(line.per_context for line in lines)
        held = latency.pp * (base + (latency.handover if latency.pp > 1 else 0.0)) + host.per_step
        alone = host.per_step if latency.pp == 1 else 0.0  # the device waits for the host

        def enough(rate: float) -> bool:
            computed = rate * self.moments.contexts
            free = 1 - context * computed
            if free <= 0:
                return False
            squares = latency.pp * context * computed**2 * (base + alone) / free
            return held * computed + squares <= memory

        low, high = 0.0, 1 / max(1e-9, context * self.moments.contexts, held * self.moments.contexts / memory)
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if enough(middle) else (low, middle)
        return 1 / max(high, 1e-9)

    def _line_seconds(self, line: DecodeLine, batch: int, memory: int, least: float) -> float:
        moments = self.moments
        steps = max(moments.steps / batch, moments.contexts / memory)
        return (
            max(0.0, line.base + least) * steps
            + line.per_context * moments.contexts
            + line.per_sequence * moments.steps
        )
