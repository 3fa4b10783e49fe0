"""The application: the console's pages and, where there is a model, its routes, behind one guard."""

import importlib.util
import time
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.answers import RETRY_SECONDS, ApiError, json_response
from serve.metrics import CONTENT_TYPE, Metrics
from serve.openapi import description
from serve.security import Guard
from serve.settings import Settings

if TYPE_CHECKING:
    from serve.model.service import Service

STARTED = int(time.time())


def build_app(settings: Settings, model: "Service | None" = None) -> Starlette:
    """The application. `model` answers requests (`serve.model`); without it nothing here imports torch.

    `app.state.draining` is True once the server shall end: what streams without an end of its own looks at it.
    """
    metrics = model.metrics if model else Metrics()
    metrics.counter("llmops_requests_total", "Requests that were answered, by path and status.")
    routes: list[BaseRoute] = [
        Route("/health", health),
        Route("/metrics", lambda request: PlainTextResponse(metrics.text(), media_type=CONTENT_TYPE)),
        Route("/v1/models", models),
        Route("/openapi.json", lambda request: json_response(description(bool(model), bool(model and model.intents)))),
    ]
    if model:
        from serve.model.routes import routes as model_routes

        routes += model_routes(model)
    routes += console_routes(settings)
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(Counting, metrics=metrics),
            Middleware(Guard, access=settings.access),
            Middleware(ServerErrorMiddleware, handler=failed),  # within: these answers have the headers and are counted
        ],
        exception_handlers={ApiError: refuse, HTTPException: refuse_http, 500: failed},
    )
    app.state.model, app.state.settings, app.state.draining = model, settings, False
    return app


def console_routes(settings: Settings) -> list[BaseRoute]:
    """The console's pages; a line of text where the console is left out."""
    if importlib.util.find_spec("serve.console") is None:
        return [Route("/", lambda request: PlainTextResponse("LLMOps: the models are at /v1/models\n"))]
    from serve.console.routes import routes as pages

    return list(pages(settings.mount_path))


def health(request: Request) -> Response:
    """Whether the server answers and, with a model, its engine runs."""
    model = request.app.state.model
    if request.app.state.draining or (model and not model.alive):
        status = "ending" if request.app.state.draining else "failed"
        return json_response({"status": status}, 503, {"retry-after": str(RETRY_SECONDS)})
    return json_response({"status": "ok"})


def models(request: Request) -> Response:
    """The models that can be asked, as OpenAI lists them; `intents` tells which knows FAQ intents."""
    model = request.app.state.model
    found = model.listed() if model else []
    data = [{"id": name, "object": "model", "created": STARTED, "owned_by": "llmops", **more} for name, more in found]
    return json_response({"object": "list", "data": data})


async def refuse(request: Request, error: Exception) -> Response:
    """An error of ours."""
    assert isinstance(error, ApiError)
    return error.response


async def refuse_http(request: Request, error: Exception) -> Response:
    """An error of Starlette's: a path or a method that is not there."""
    assert isinstance(error, HTTPException)
    found = ApiError(error.status_code, f"{request.method} {request.scope['path'][:200]}: {error.detail}").response
    found.headers.update(error.headers or {})
    return found


async def failed(request: Request, error: Exception) -> Response:
    """A fault of ours: its traceback is in the server's log, and not in the answer."""
    return ApiError(500, "the server made a mistake; its log says which").response


class Counting:
    """ASGI middleware that counts answers by the route's path (never by what a client makes up) and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count an answer when it begins."""

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                path = getattr(route, "path", "") or "other"
                self.metrics.add("llmops_requests_total", path=path, status=str(message["status"]))
            await send(message)

        await self.app(scope, receive, counted if scope["type"] == "http" else send)
