"""What all pages share: templates, language, answers for what is not there or cannot be done."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from anyio import CapacityLimiter, to_thread
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from llmops import files, json_text
from llmops.console import RunStopped, UserError
from serve.console import languages, shown
from serve.console.mount import NotFound

HERE = Path(__file__).parent
OWN_PAGE = re.compile(r"/(?!/)[^\\\x00-\x1f\x7f]*")  # browsers read //x and /\x as another site's, and pass over tabs
YEAR = 365 * 24 * 3600
Handler = Callable[[Request], Response]
STATUS_MISSING, STATUS_WRONG, STATUS_FULL = 404, 422, 507


class Pages:
    """Renders templates in the reader's language."""

    def __init__(self) -> None:
        self.environment = Environment(
            loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
            lstrip_blocks=True,
        )  # fmt: skip
        self.environment.globals |= {"query": query, "address": address}
        self.environment.filters |= {
            "loss": shown.loss, "amount": shown.amount, "percent": shown.percent, "three": shown.three,
            "words": shown.words,
        }  # fmt: skip
        self.environment.tests["has_key"] = lambda mapping, key: key in mapping
        self.chinese = languages.load()

    def translator(self, request: Request) -> languages.Translate:
        """t() in the reader's language."""
        return languages.translator(languages.language_of(request), self.chinese)

    def render(self, request: Request, template: str, status: int = 200, **values: Any) -> Response:
        """A page."""
        language = languages.language_of(request)
        t = languages.translator(language, self.chinese)
        here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        text = self.environment.get_template(template).render(
            t=t, told=lambda text: languages.told(text, language),
            language=language, languages=languages.LANGUAGES, here=here, path=request.url.path,
            ago=lambda moment: shown.ago(moment, t), **values,
        )  # fmt: skip
        headers = {"Cache-Control": "no-store", "Vary": "Accept-Language, Cookie"}
        return HTMLResponse(text, status, headers)

    def page(self, path: str, handler: Handler) -> Route:
        """A route whose errors are pages."""

        def answer(request: Request) -> Response:
            try:
                return handler(request)
            except NotFound:
                return self.render(request, "error.html", STATUS_MISSING, message="")
            except (UserError, RunStopped) as error:
                return self.render(request, "error.html", STATUS_WRONG, message=str(error))

        return Route(path, in_thread(answer), methods=["GET"])

    def data(self, path: str, handler: Callable[[Request], Any], most: int = 0) -> Route:
        """A route that answers with JSON, its errors in the shape of the model server's.

        `most`: so many threads of its own; who waits for one keeps no other page from being answered.
        """
        return Route(path, in_thread(lambda request: as_json(lambda: handler(request)), most), methods=["GET"])

    def write(self, path: str, handler: Callable[[dict[str, Any]], Any]) -> Route:
        """A route that takes a JSON object. A form of another site cannot send one: its type is refused."""

        async def endpoint(request: Request) -> Response:
            if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
                return failure(415, "expected Content-Type: application/json")
            body = await request.body()
            value, problem = files.parse_line(body)
            if problem or not isinstance(value, dict):
                return failure(400, problem or f"found {files.kind_of(value)}, expected an object")
            return await run_in_threadpool(as_json, lambda: handler(value))

        return Route(path, endpoint, methods=["POST"])

    def shared(self) -> list[BaseRoute]:
        """Scripts and styles, and the switch of the language."""
        return [
            Route("/console/language/{language}", set_language, methods=["GET"]),
            Mount("/console/static", Kept(directory=HERE / "static")),
        ]


class Kept(StaticFiles):
    """Files that a browser may keep and has to ask about."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """As Starlette's, with the header."""
        found = super().file_response(*args, **kwargs)
        found.headers["Cache-Control"] = "no-cache"
        return found


def in_thread(handler: Handler, most: int = 0) -> Callable[[Request], Any]:
    """A handler that reads files, off the event loop; in at most so many threads, or in those that all share."""
    limiter = CapacityLimiter(most) if most else None

    async def endpoint(request: Request) -> Response:
        return await to_thread.run_sync(handler, request, limiter=limiter)

    return endpoint


def as_json(work: Callable[[], Any]) -> Response:
    """What a handler returns as JSON, and its errors."""
    try:
        value = work()
    except NotFound:
        return failure(STATUS_MISSING, "there is nothing of this name under the mount")
    except UserError as error:
        return failure(STATUS_WRONG, str(error))
    except RunStopped as error:
        return failure(STATUS_FULL, str(error))
    return Response(json_text.dumps(value), media_type="application/json", headers={"Cache-Control": "no-store"})


def failure(status: int, message: str) -> Response:
    """An error as OpenAI's servers write it."""
    return JSONResponse(
        {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}, status
    )


def set_language(request: Request) -> Response:
    """Remember a language in a cookie and go back to a page of ours."""
    language = request.path_params["language"]
    place = request.query_params.get("next", "/")
    answer = RedirectResponse(place if OWN_PAGE.fullmatch(place) else "/", 303)
    if language in languages.LANGUAGES:
        answer.set_cookie(languages.COOKIE, language, max_age=YEAR, samesite="strict", httponly=True)
    return answer


def query(**values: Any) -> str:
    """?a=1&b=2, without what is empty; a list stands for several of one name."""
    kept = {key: value for key, value in values.items() if value not in (None, "", [], 0)}
    return "?" + urlencode(kept, doseq=True) if kept else "?"


def address(*parts: str) -> str:
    """A path from parts of which a name may hold anything."""
    return "/" + "/".join(quote(part, safe="/") for part in parts)


def whole_number(request: Request, name: str, default: int = 0) -> int:
    """A number from 0 of the query. Raises UserError for another text."""
    found = request.query_params.get(name, "") or str(default)
    if not found.isascii() or not found.isdecimal() or len(found) > 18:
        raise UserError(f"{name} is {files.shown(found)}, expected a whole number from 0")
    return int(found)
