"""In place of vLLM: `python fake_vllm.py PORT DIARY [MODE]`, a server with its API that computes nothing. Every start
and every request is a line of the diary; as vLLM's prefill server it says where a prompt's KV would be.

MODE   refuses: ends at once with a word on stderr;   dies: ends in the middle of the third request
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from aiohttp import web

TOKENS = range(100, 164)
_STATE = {"requests": 0}


async def complete(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    note({"request": body})
    _STATE["requests"] += 1
    if MODE == "dies" and _STATE["requests"] == 3:
        os._exit(3)
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
    given = body.get("kv_transfer_params")
    if not body.get("stream"):
        found = {"do_remote_prefill": True, "remote_port": PORT} if given else None
        return web.json_response({"choices": [], "usage": usage, "kv_transfer_params": found})
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for i in range(body["max_tokens"]):
        await asyncio.sleep(0.002)
        finish = "length" if i == body["max_tokens"] - 1 else None
        choice = {"index": 0, "text": "t", "finish_reason": finish}
        await response.write(b"data: " + json.dumps({"id": "x", "choices": [choice]}).encode() + b"\n\n")
    await response.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n")
    return response


async def answer(request: web.Request) -> web.Response:
    if request.path == "/v1/models":
        return web.json_response({"data": [{"id": "demo", "max_model_len": 8192}]})
    return web.json_response({"tokens": list(TOKENS)})


def note(line: dict[str, object]) -> None:
    with DIARY.open("a") as file:
        file.write(json.dumps({"port": PORT, **line}) + "\n")


if __name__ == "__main__":
    PORT, DIARY, MODE = int(sys.argv[1]), Path(sys.argv[2]), "".join(sys.argv[3:])
    note({"pid": os.getpid()})
    if MODE == "refuses":
        sys.exit("no such accelerator")
    app = web.Application()
    app.router.add_get("/health", answer)
    app.router.add_get("/v1/models", answer)
    app.router.add_post("/tokenize", answer)
    app.router.add_post("/v1/completions", complete)
    web.run_app(app, host="127.0.0.1", port=PORT, access_log=None, print=lambda *_: None)
