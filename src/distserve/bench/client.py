"""Sends one request to an OpenAI server and says what became of it. Knows no schedule and no workload."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from dataclasses import dataclass

import aiohttp

from distserve import metrics
from distserve.bench.stream import Answer, BadStreamError
from distserve.metrics import Record
from distserve.traces import Arrival

clock = time.perf_counter  # of every time stamp in this folder

# The statuses of failed requests, as reports and CSV files show them, beside those of `metrics`.
REJECTED = "rejected"  # any other 4xx: the server finds the request wrong
CLIENT_LIMIT = "client_limit"  # this machine gave the client no connection: no fault of the server
UNFINISHED = "unfinished"  # in flight when the run was stopped, and its TTFT target already missed
UNREACHABLE = "unreachable"  # no connection
DISCONNECTED = "disconnected"  # the connection broke, or the stream ended before the answer did
TIMEOUT = "timeout"
BAD_STREAM = "bad_stream"  # something else than a stream of events
_OWN_LIMITS = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM)


@dataclass(slots=True)
class Result:
    """A record, and what a report wants to know beyond it."""

    record: Record
    end: float  # when it was over, on `clock`
    late: float  # seconds between the moment it was due and its sending: this client's fault, not the server's
    asked: Arrival
    message: str = ""  # of a failure
    counted_events: bool = False  # the server sent no usage: tokens were counted by events


class Client:
    """A pool of connections to one server."""

    def __init__(self, url: str, *, api_key: str | None, timeout: float) -> None:
        self.url = url
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}  # no time for gunzip
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout = timeout
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        # As many connections as requests in flight. Idle ones are dropped before servers drop them (uvicorn: 5 s),
        # else a request now and then meets a closing connection and would count as the server's failure.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)
        self._session = aiohttp.ClientSession(
            connector=connector, headers=self._headers, timeout=aiohttp.ClientTimeout(total=None), auto_decompress=False
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        assert self._session is not None, "use `async with Client(...)`"
        return self._session

    async def send(self, path: str, body: bytes, asked: Arrival, due: float, answer: Answer | None = None) -> Result:
        """Never raises for what the server or the network does: that is the result. `due` is on `clock`; `answer` is
        filled on the way, for who wants to look at it."""
        sent = clock()
        answer = answer if answer is not None else Answer()
        status, message = metrics.OK, ""
        try:
            async with asyncio.timeout(self._timeout), self.session.post(self.url + path, data=body) as response:
                if response.status != 200:
                    status, message = _status(response.status), await _error(response)
                else:
                    async for data in response.content.iter_any():
                        answer.feed(data, clock())
                    answer.close()
                    status, message = _verdict(answer, response.content_type)
        except TimeoutError:
            status, message = TIMEOUT, f"no complete answer within {self._timeout:g} s"
        except aiohttp.ClientConnectorError as error:
            ours = error.os_error.errno in _OWN_LIMITS
            status, message = CLIENT_LIMIT if ours else UNREACHABLE, reason(error)
        except (aiohttp.ClientError, ConnectionError) as error:
            status, message = DISCONNECTED, reason(error)
        except BadStreamError as error:
            status, message = BAD_STREAM, str(error)
        return _result(answer, asked, due, sent, status, message)


def _result(answer: Answer, asked: Arrival, due: float, sent: float, status: str, message: str) -> Result:
    tokens = answer.output_tokens if answer.output_tokens is not None else answer.num_events
    ttft = tpot = None
    if answer.first is not None:
        ttft = answer.first - due
        if answer.last is not None:
            tpot = metrics.tpot(answer.first, answer.last, tokens)
    record = Record(
        asked.arrival,
        answer.prompt_tokens if answer.prompt_tokens is not None else asked.prompt_tokens,
        tokens if status == metrics.OK else asked.output_tokens,
        ttft,
        tpot,
        status,
        asked.app,
    )
    counted = status == metrics.OK and answer.output_tokens is None
    return Result(record, clock(), max(0.0, sent - due), asked, message, counted)


def _verdict(answer: Answer, content_type: str) -> tuple[str, str]:
    """Status and message of a stream that came with HTTP status 200 and is over."""
    if answer.error is not None:
        return metrics.SERVER_ERROR, answer.error
    if answer.first is None and content_type != "text/event-stream":
        return BAD_STREAM, f"the server answered with {content_type}, not with a stream of events"
    if answer.first is None:
        return DISCONNECTED, "the stream ended without a token"
    if not (answer.done or answer.finished):
        return DISCONNECTED, "the stream ended in the middle of the answer"
    return metrics.OK, ""


def _status(code: int) -> str:
    if code in (429, 503):
        return metrics.REFUSED if code == 429 else metrics.UNAVAILABLE
    return REJECTED if 400 <= code < 500 else metrics.SERVER_ERROR


def reason(error: Exception) -> str:
    """What a failed connection met, in the system's words."""
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the connection broke in the middle of the answer"
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, OSError) and cause.errno is not None and cause.errno > 0:
        return os.strerror(cause.errno)
    return " ".join(str(cause).split()) or type(cause).__name__


async def _error(response: aiohttp.ClientResponse) -> str:
    """What the server says is wrong, in one line."""
    text = (await response.content.read(4096)).decode("utf-8", "replace")
    return f"HTTP {response.status}: {' '.join(text.split())[:300]}"
