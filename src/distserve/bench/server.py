"""What a server tells about itself before a load: its model and its context."""

from __future__ import annotations

from dataclasses import dataclass

import aiohttp

from distserve.bench.client import Client, reason
from distserve.errors import DistserveError, UsageError

PROBE_TIMEOUT = aiohttp.ClientTimeout(total=30)


class NoServerError(DistserveError):
    """Nothing answers where a server was promised. Ends a bench with exit status 1."""


@dataclass(frozen=True, slots=True)
class Server:
    """One model of one server."""

    model: str | None  # None: the server names none; requests then leave it out
    context: int | None  # tokens of prompt and answer; None: not told


async def look(client: Client, wanted: str | None) -> Server:
    """Asks for the models. Raises `NoServerError`, also where the server says that it is not ready, or `UsageError`
    where the model or the key is wrong."""
    try:
        async with client.session.get(f"{client.url}/health", timeout=PROBE_TIMEOUT) as response:
            if response.status == 503:  # while a model loads; whoever has no /health answers something else
                raise NoServerError(f"{client.url} says that it is not ready (HTTP 503 at /health): wait until it is")
        async with client.session.get(f"{client.url}/v1/models", timeout=PROBE_TIMEOUT) as response:
            if response.status in (401, 403):
                raise UsageError(
                    f"{client.url} asks for a key (HTTP {response.status}): give the right one with --api-key"
                )
            if response.status == 404:
                return Server(wanted, None)  # not every server lists its models
            if response.status != 200:
                raise NoServerError(f"{client.url}/v1/models answers HTTP {response.status}: is the server ready?")
            listed = (await response.json(content_type=None))["data"]
            models = {str(entry["id"]): entry.get("max_model_len") for entry in listed}
    except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
        raise NoServerError(f"no server answers at {client.url} ({reason(error)}): start one, or mend --url") from None
    except (KeyError, TypeError, ValueError, AttributeError):
        raise NoServerError(f"{client.url}/v1/models does not answer as OpenAI's API: is --url right?") from None
    if wanted is not None and wanted not in models:
        raise UsageError(f"--model {wanted}: the server has {', '.join(models) or 'none'}")
    model = wanted if wanted is not None else next(iter(models), None)
    context = models.get(model) if model is not None else None
    return Server(model, context if isinstance(context, int) and context >= 2 else None)


async def alive(client: Client) -> bool:
    """Whether anything still answers there."""
    try:
        async with client.session.get(f"{client.url}/v1/models", timeout=PROBE_TIMEOUT):
            return True
    except (aiohttp.ClientError, ConnectionError, TimeoutError):
        return False
