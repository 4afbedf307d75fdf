"""The HTTP server: OpenAI's routes, those that operators need, and a page at `/`.

app = make_app(engine, served, options, metrics)
"""

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
)

import jaxspark
from jaxspark.serving import openapi
from jaxspark.serving.answering import answered
from jaxspark.serving.app_options import AppOptions
from jaxspark.serving.assembler import Assembler
from jaxspark.serving.chat_answer import ChatAssembler
from jaxspark.serving.chat_request import ChatRequest
from jaxspark.serving.completion_answer import CompletionAssembler
from jaxspark.serving.engine import Engine
from jaxspark.serving.fields import SamplingFields, Wire
from jaxspark.serving.http import (
    Logged,
    add_error_handlers,
    body_of,
    check_key,
    cors,
    note,
)
from jaxspark.serving.jobs import Job
from jaxspark.serving.metrics import CONTENT_TYPE, Metrics
from jaxspark.serving.other_requests import (
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from jaxspark.serving.prepared import prepare_chat, prepare_completion
from jaxspark.serving.responses import ChatAnswer, CompletionAnswer
from jaxspark.serving.served import Served
from jaxspark.serving.tokens import detokenize, models, tokenize
from jaxspark.serving.tracing import Tracing

PAGE = Path(__file__).parent / "page.html"
# The page loads nothing, and talks to nobody but this server.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; "
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'; frame-ancestors 'none'"
}


def make_app(
    engine: Engine,
    served: Served,
    options: AppOptions = AppOptions(),
    metrics: Metrics | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The server as an ASGI application; the engine is started and stopped elsewhere.

    Args:
      engine: computes.
      served: the model under its name; its context is at most the engine's.
      options: limits and keys.
      metrics: observes the engine; None leaves `/metrics` out.
      tracing: makes spans of answers; None makes none.
    """
    app = FastAPI(
        title="jaxspark",
        version=jaxspark.__version__,
        responses=openapi.ERRORS,
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
    )
    add_error_handlers(app)
    _add_model_routes(app, engine, served, options)
    _add_operators_routes(app, engine, metrics)
    openapi.describe(
        app,
        [
            *(ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest),
            *(ChatAnswer, CompletionAnswer),
        ],
    )
    if options.cors_origins:
        app.add_middleware(CORSMiddleware, **cors(options))
    app.add_middleware(Logged, tracing=tracing)
    return app


def _add_model_routes(
    app: FastAPI, engine: Engine, served: Served, options: AppOptions
) -> None:
    async def output(
        request: Request,
        schema: type[SamplingFields],
        prepare: Callable[..., Any],
        assembler: type[Assembler],
    ) -> Response:
        key = check_key(request, options)
        body = await body_of(request, options)
        # Where there is no room nothing is computed.
        engine.check_room()

        def understood() -> tuple[Any, Sequence[Job]]:
            read = schema.read(body)
            created = int(time.time())
            prepared = prepare(read, served, id=uuid.uuid4().hex, created=created)
            note(request, request=prepared.id)
            client = key or _caller(request, read)
            return prepared, engine.check(*prepared.demands, client=client)

        # Long prompts take a while; others are answered meanwhile.
        prepared, jobs = await asyncio.to_thread(understood)
        return await answered(request, assembler(prepared), engine.take_on(jobs))

    async def told(
        request: Request, schema: type[Wire], tell: Callable[..., Any]
    ) -> Response:
        check_key(request, options)
        body = await body_of(request, options)
        return JSONResponse(
            await asyncio.to_thread(lambda: tell(schema.read(body), served))
        )

    @app.post(
        "/v1/chat/completions",
        openapi_extra=openapi.body(ChatRequest),
        responses=openapi.answer(ChatAnswer),
    )
    async def chat(request: Request) -> Response:
        """Answers a conversation."""
        return await output(request, ChatRequest, prepare_chat, ChatAssembler)

    @app.post(
        "/v1/completions",
        openapi_extra=openapi.body(CompletionRequest),
        responses=openapi.answer(CompletionAnswer),
    )
    async def completion(request: Request) -> Response:
        """Continues prompts."""
        return await output(
            request, CompletionRequest, prepare_completion, CompletionAssembler
        )

    @app.post("/tokenize", openapi_extra=openapi.body(TokenizeRequest))
    async def to_tokens(request: Request) -> Response:
        """Tells the tokens of a text or a conversation."""
        return await told(request, TokenizeRequest, tokenize)

    @app.post("/detokenize", openapi_extra=openapi.body(DetokenizeRequest))
    async def to_text(request: Request) -> Response:
        """Tells the text of tokens."""
        return await told(request, DetokenizeRequest, detokenize)

    @app.get("/v1/models")
    async def listed(request: Request) -> Response:
        """Lists the model."""
        check_key(request, options)
        return JSONResponse(models(served))

    @app.get("/v1/models/{name:path}")
    async def one(request: Request, name: str) -> Response:
        """Tells of the model."""
        check_key(request, options)
        served.check_model(name)
        return JSONResponse(models(served)["data"][0])


def _add_operators_routes(
    app: FastAPI, engine: Engine, metrics: Metrics | None
) -> None:
    page = PAGE.read_text("utf-8")

    def state(good: bool) -> Response:
        return JSONResponse({"status": engine.state}, status_code=200 if good else 503)

    @app.get("/health")
    @app.head("/health", include_in_schema=False)
    @app.get("/ping")
    @app.head("/ping", include_in_schema=False)
    async def health() -> Response:
        """200 as long as the engine works, or still compiles; 503 once it failed."""
        return state(engine.state not in ("failed", "stopped"))

    @app.get("/ready")
    @app.head("/ready", include_in_schema=False)
    async def ready() -> Response:
        """200 while requests are taken on."""
        return state(engine.state == "ready")

    @app.get("/version")
    async def version() -> Response:
        """Tells the version."""
        return JSONResponse({"version": jaxspark.__version__})

    @app.get("/stats")
    async def stats() -> Response:
        """The engine at a glance, for the page."""
        return JSONResponse(asdict(engine.stats()))

    @app.get("/", include_in_schema=False)
    @app.head("/", include_in_schema=False)
    async def index() -> Response:
        """The page."""
        return HTMLResponse(page, headers=_PAGE_HEADERS)

    if metrics is not None:

        @app.get("/metrics", response_class=PlainTextResponse)
        async def scraped() -> Response:
            """Metrics in Prometheus' format."""
            return Response(metrics.text(), media_type=CONTENT_TYPE)


def _caller(request: Request, read: SamplingFields) -> str:
    """Who asks, where there are no keys: the user that is named, or the address."""
    if isinstance(read.user, str) and read.user:
        return f"user:{read.user[:128]}"
    return f"host:{request.client.host}" if request.client else ""
