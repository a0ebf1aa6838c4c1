"""Runs one offer against one server: prompts and bodies, sent when they are due. Knows no other run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec

from distserve.bench import show
from distserve.bench.client import Client, Result
from distserve.bench.load import Load
from distserve.bench.measure import Offer, Outcome, prepared, told
from distserve.bench.options import BenchOptions
from distserve.bench.prompts import Prompts
from distserve.bench.server import Server
from distserve.bench.stream import Answer
from distserve.traces import Arrival


class Runner:
    """`load` is the run that is going on; None between runs."""

    def __init__(self, options: BenchOptions, client: Client, server: Server, prompts: Prompts) -> None:
        self._options = options
        self._client = client
        self._server = server
        self._prompts = prompts
        self._said: set[str] = set()
        self.load: Load | None = None

    async def one(self, offer: Offer, title: str, salt: int, before: Sequence[Outcome]) -> Outcome | None:
        """One run, shown while it goes on; None: it ended before any request was over. `before`: earlier runs."""
        context = self._options.context or self._server.context
        if context is not None:
            offer = replace(offer, workload=offer.workload.clipped(context))
        notes = [*offer.workload.notes, *([self._prompts.note] if self._prompts.note else [])]
        for note in notes:
            if note not in self._said:
                self._said.add(note)
                show.say(f"note: {note}")
        arrivals = offer.workload.arrivals
        with show.steps("preparing prompts", len(arrivals)) as done:
            fitted = await self._prompts.fit(arrivals, salt, done)
        if self._prompts.missed:
            notes.append(
                f"{len(self._prompts.missed)} prompts could not be made of exactly as many tokens as asked for"
            )
            self._prompts.missed.clear()
        bodies: dict[int, bytes] = {}
        answers: dict[int, Answer] = {}

        def prepare(number: int, request: Arrival) -> None:
            part = fitted.pop(number, None) or self._prompts.make(number, request.prompt_tokens, salt)
            bodies[number] = self._body(part, request)

        async def send(number: int, request: Arrival, due: float) -> Result:
            answers[number] = answer = Answer()
            result = await self._client.send(self._path, bodies.pop(number), request, due, answer)
            del answers[number]  # stays where the run was stopped: how far it had come
            return result

        measure = prepared(offer, self._options.targets, send, prepare, answers)
        self.load = measure.load
        try:
            with show.live(measure, title, before):
                await measure.load.go()
        finally:
            self.load = None
        return told(measure, self._options.devices, notes, self._options.ignore_eos)

    @property
    def _path(self) -> str:
        return "/v1/chat/completions" if self._options.endpoint == "chat" else "/v1/completions"

    def _body(self, part: dict[str, Any], request: Arrival) -> bytes:
        body: dict[str, Any] = {
            "max_tokens": request.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **part,
        }
        if self._server.model is not None:
            body["model"] = self._server.model
        if self._options.ignore_eos:
            body["ignore_eos"] = True
        return msgspec.json.encode(body)
