"""Answers that every part of the server gives: errors in OpenAI's shape, JSON as the other commands write it."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from llmops import json_text

RETRY_SECONDS = 1  # after which a busy server may be asked again


class ApiError(Exception):
    """A request that is refused: what the client is told."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry = status, message, param, code, retry

    @property
    def body(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> Response:
        """The answer over HTTP."""
        headers = {} if self.retry is None else {"retry-after": str(self.retry)}
        if self.status in (408, 413):  # the rest of the body is not waited for
            headers["connection"] = "close"
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return json_response(self.body, self.status, headers)


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON value as an answer."""
    return Response(json_text.dumps(value), status, headers, "application/json")
