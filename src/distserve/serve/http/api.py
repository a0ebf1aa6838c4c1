"""The HTTP interface: OpenAI's routes, vLLM's additions, and the server's own. Decides nothing."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from distserve.errors import DistserveError, RequestError
from distserve.serve.base import Generator
from distserve.serve.http.answer import AnswerResponse
from distserve.serve.http.completions import Completions
from distserve.serve.http.direct import Direct
from distserve.serve.http.edge import REQUEST_ID, Edge
from distserve.serve.http.openai import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from distserve.serve.http.prompts import chat_prompt, text_prompts
from distserve.serve.http.refusals import invalid_body, refusal
from distserve.serve.http.tokens import Tokenizer


@dataclass(frozen=True, slots=True)
class ApiOptions:
    models: tuple[str, ...]  # the served model's names, the first is its main one
    api_keys: tuple[str, ...] = ()  # none: open to everybody
    metrics: Callable[[], tuple[bytes, str]] | None = None  # the body of /metrics and its content type
    root: str = ""  # where the model came from (`root` in /v1/models)
    version: str = field(default_factory=lambda: importlib.metadata.version("distserve"))
    max_body: int = 16 << 20  # bytes of a request's body
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)  # e.g. {"temperature": 0.6}


def build_app(generator: Generator, tokens: Tokenizer, options: ApiOptions) -> ASGIApp:
    """The ASGI application that serves one model."""
    app = FastAPI(title="distserve", version=options.version, redirect_slashes=False)
    completions = Completions(generator, tokens, options.models, options.sampling_defaults)
    direct = _generation_routes(app, completions)
    app.include_router(_model_routes(completions, options))
    app.include_router(_token_routes(completions))
    app.include_router(_server_routes(generator, options))
    app.add_exception_handler(DistserveError, _refuse)
    app.add_exception_handler(Exception, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_body)
    app.add_exception_handler(HTTPException, _refuse_route)
    return Edge(app, direct, options.api_keys, options.max_body)


def _generation_routes(app: FastAPI, completions: Completions) -> dict[str, ASGIApp]:
    """Adds them to `app`, which documents them, and returns by path who answers a POST in its place."""

    async def chat(body: ChatCompletionRequest, request: Request) -> Response:
        answer = await completions.chat(body, request.scope[REQUEST_ID])
        return AnswerResponse(completions.generator, answer)

    async def complete(body: CompletionRequest, request: Request) -> Response:
        answer = await completions.complete(body, request.scope[REQUEST_ID])
        return AnswerResponse(completions.generator, answer)

    app.post("/v1/chat/completions")(chat)
    app.post("/v1/completions")(complete)
    return {
        "/v1/chat/completions": Direct(ChatCompletionRequest, chat),
        "/v1/completions": Direct(CompletionRequest, complete),
    }


def _model_routes(completions: Completions, options: ApiOptions) -> APIRouter:
    router = APIRouter()
    created = int(time.time())

    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "distserve",
            "root": options.root or options.models[0],
            "parent": None,
            "max_model_len": completions.generator.max_model_len,
        }

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in options.models]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return card(completions.model(name))

    return router


def _token_routes(completions: Completions) -> APIRouter:
    router = APIRouter()
    tokens = completions.tokens

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        completions.model(body.model)
        limit = 1 << 62  # counting is allowed beyond the context
        if body.messages is not None:
            prompt = await chat_prompt(body, tokens, bool(body.add_special_tokens), limit)
        elif body.prompt is not None:
            prompt = (await text_prompts(body.prompt, tokens, body.add_special_tokens is not False, limit))[0]
        else:
            raise RequestError("prompt is missing (or messages, for a chat)", param="prompt")
        strings = [tokens.token(id) for id in prompt.ids] if body.return_token_strs else None
        return {
            "count": len(prompt.ids),
            "max_model_len": completions.generator.max_model_len,
            "tokens": prompt.ids,
            "token_strs": strings,
        }

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        completions.model(body.model)
        for i, id in enumerate(body.tokens):
            if not 0 <= id < tokens.vocab_size:
                raise RequestError(f"tokens[{i}] is {id}, which is no token of this model", param=f"tokens[{i}]")
        return {"prompt": tokens.decode(body.tokens)}

    return router


def _server_routes(generator: Generator, options: ApiOptions) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> JSONResponse:
        ready = generator.ready()
        content = {"status": "ok" if ready else "unavailable", **generator.status()}
        return JSONResponse(content, status_code=200 if ready else 503)

    @router.post("/ping", include_in_schema=False)  # SageMaker's probes
    @router.get("/ping")
    async def ping() -> Response:
        return Response(status_code=200 if generator.ready() else 503)

    @router.get("/version")
    async def version() -> dict[str, str]:
        return {"version": options.version}

    @router.get("/metrics")
    async def metrics() -> Response:
        if options.metrics is None:
            raise HTTPException(404, "this server keeps no metrics")
        body, kind = options.metrics()
        return Response(body, headers={"content-type": kind})

    return router


async def _refuse(request: Request, error: Exception) -> Response:
    told = refusal(error)
    response = JSONResponse(told.body, status_code=told.status)
    response.raw_headers.extend(told.headers)
    return response


async def _refuse_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return await _refuse(request, invalid_body(error.errors(), error.body))


async def _refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path
    told = {404: f"There is no {method} {path} here.", 405: f"{path} does not take {method}."}
    default = {404: "Not Found", 405: "Method Not Allowed"}.get(error.status_code) == error.detail
    message = told[error.status_code] if default else error.detail
    return await _refuse(request, RequestError(message, status=error.status_code))
