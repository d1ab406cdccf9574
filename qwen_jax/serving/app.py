"""The FastAPI application: which path leads where."""

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pydantic
from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import qwen_jax
from qwen_jax.serving import protocol, texts, throughput
from qwen_jax.serving.chat import Chat
from qwen_jax.serving.completions import Completions
from qwen_jax.serving.context import B, Context, in_pieces, in_thread, read_body
from qwen_jax.serving.errors import ApiError
from qwen_jax.serving.guard import Guard
from qwen_jax.serving.running import EventStream, time_limit, while_connected
from qwen_jax.serving.settings import ServerSettings, Service

_PAGE = Path(__file__).parent / "page.html"
_BODIES: tuple[type[protocol.Body], ...] = (
    protocol.CompletionRequest,
    protocol.ChatRequest,
    protocol.EmbeddingRequest,
    protocol.ScoreRequest,
    protocol.TokenizeRequest,
    protocol.DetokenizeRequest,
)
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "An error.",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
}


def create_app(service: Service, settings: ServerSettings) -> FastAPI:
    """Makes the application.

    Args:
      service: the model.
      settings: names, keys and limits.

    Returns:
      The application; `app.state.context` is its `Context`.
    """
    context = Context(service, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        reporting = None
        if service.engine is not None and settings.log_interval:
            reporting = asyncio.create_task(throughput.report(service.engine, settings.log_interval))
        yield
        if reporting is not None:
            reporting.cancel()
        context.close()
        if service.engine is not None:
            await asyncio.to_thread(service.engine.close)

    # The pages of /docs would load scripts from elsewhere.
    app = FastAPI(title="qwen_jax", version=qwen_jax.__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.context = context
    app.include_router(_generation(context))
    app.include_router(_text_endpoints(context))
    app.include_router(_about(context))
    app.add_middleware(Guard, context=context)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    _add_error_handlers(app)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


async def whole(answer: dict[str, Any]) -> Response:
    """An answer as one object, which may be large."""
    return Response(await in_thread(lambda: in_pieces(answer).encode()), media_type="application/json")


def _takes(body: type[protocol.Body]) -> dict[str, Any]:
    """Declares the body of a route, which `read_body` reads."""
    schema = {"$ref": f"#/components/schemas/{body.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _generation(context: Context) -> APIRouter:
    router = APIRouter(responses=_RESPONSES)

    async def answer(request: Request, job: Completions | Chat, stream: bool | None) -> Response:
        try:
            async with time_limit(context, job.arrival):
                run = await while_connected(request, job.start())
        except BaseException:
            if job.run is not None:
                job.run.close()
            raise
        if stream:
            return EventStream(run, job.chunks(run), context.settings.send_timeout)
        return await whole(await while_connected(request, job.answer(run)))

    @router.post("/v1/completions", openapi_extra=_takes(protocol.CompletionRequest))
    async def completions(request: Request) -> Response:
        body = await read_body(request, protocol.CompletionRequest, context.settings)
        return await answer(request, Completions(context, body), body.stream)

    @router.post("/v1/chat/completions", openapi_extra=_takes(protocol.ChatRequest))
    async def chat_completions(request: Request) -> Response:
        body = await read_body(request, protocol.ChatRequest, context.settings)
        return await answer(request, Chat(context, body), body.stream)

    return router


def _text_endpoints(context: Context) -> APIRouter:
    router = APIRouter(responses=_RESPONSES)

    def add(path: str, body: type[B], answer: Callable[[Context, B], Awaitable[dict[str, Any]]]) -> None:
        async def endpoint(request: Request) -> Response:
            checked = await read_body(request, body, context.settings)

            async def work() -> dict[str, Any]:
                return await answer(context, checked)

            return await whole(await while_connected(request, work()))

        endpoint.__name__ = answer.__name__
        router.post(path, openapi_extra=_takes(body))(endpoint)

    add("/v1/embeddings", protocol.EmbeddingRequest, texts.embeddings)
    add("/v1/score", protocol.ScoreRequest, texts.score)
    add("/tokenize", protocol.TokenizeRequest, texts.tokenize)
    add("/detokenize", protocol.DetokenizeRequest, texts.detokenize)
    return router


def _about(context: Context) -> APIRouter:
    """What the server says of itself."""
    router = APIRouter(responses=_RESPONSES)
    created = int(time.time())
    page, policy = _page()

    def cards() -> list[dict[str, Any]]:
        first = context.settings.served_names[0]
        names = [(name, None) for name in context.settings.served_names]
        return [
            {
                "id": name,
                "object": "model",
                "created": created,
                "owned_by": "qwen_jax",
                "root": parent or name,
                "parent": parent,
                "max_model_len": context.service.max_length,
            }
            for name, parent in [*names, *((name, first) for name in context.adapters)]
        ]

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": cards()}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        context.adapter(name)
        return next(card for card in cards() if card["id"] == name)

    @router.get("/health")
    @router.get("/ping")
    async def health() -> Response:
        status, code, cache = "ok", 200, dict[str, str]()
        if context.draining:
            status, code = "shutting down", 503
        elif context.service.engine is not None:
            try:
                cache = {"kv_dtype": context.service.engine.stats().kv_dtype}
            except Exception:
                status, code = "the engine has failed", 503
        return JSONResponse({"status": status, **cache}, code)

    @router.get("/version")
    async def version() -> dict[str, str]:
        return {"version": qwen_jax.__version__}

    @router.get("/metrics")
    async def metrics() -> Response:
        text, kind = context.metrics.page()
        return Response(text, media_type=kind)

    @router.get("/", include_in_schema=False)
    async def chat_page() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=policy)

    return router


def _page() -> tuple[bytes, dict[str, str]]:
    """The chat page, and headers that let it run its own script only."""
    page = _PAGE.read_bytes()
    scripts = re.findall(rb"<script>(.*?)</script>", page, re.DOTALL)
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(x).digest()).decode()}'" for x in scripts)
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def _add_error_handlers(app: FastAPI) -> None:
    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        method, path = request.method, request.url.path
        texts = {404: f"There is no {path:.200} here.", 405: f"{path:.200} does not take {method}."}
        message = texts.get(error.status_code, str(error.detail))
        return ApiError(message, error.status_code, headers=error.headers).response()

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The description of the API, with the bodies that the routes parse themselves."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        pairs: list[tuple[type[pydantic.BaseModel], Any]] = [(body, "validation") for body in _BODIES]
        _, schemas = models_json_schema(pairs, ref_template="#/components/schemas/{model}")
        components = document.setdefault("components", {}).setdefault("schemas", {})
        components.update(schemas["$defs"], Error=_ERROR)
        app.openapi_schema = document
    return app.openapi_schema
