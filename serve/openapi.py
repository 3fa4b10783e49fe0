"""The description of the routes at /openapi.json (OpenAPI 3.1)."""

from typing import Any

from serve.model.asked import MOST_LOGPROBS, MOST_PROMPTS, MOST_STOPS

Schema = dict[str, Any]
VERSION = "0.2.0"
TEXT: Schema = {"type": "string"}
OPEN: Schema = {"security": []}  # without a token


def number(lowest: float, highest: float, default: float, about: str) -> Schema:
    """A number in bounds."""
    bounds = {"minimum": lowest, "maximum": highest, "default": default}
    return {"type": ["number", "null"], **bounds, "description": about}


def whole(lowest: int, highest: int, about: str) -> Schema:
    """A whole number in bounds."""
    return {"type": ["integer", "null"], "minimum": lowest, "maximum": highest, "description": about}


def flag(about: str) -> Schema:
    """true or false."""
    return {"type": ["boolean", "null"], "description": about}


def shared() -> Schema:
    """What both ways of asking have."""
    stops = {"type": "array", "items": TEXT | {"minLength": 1}, "maxItems": MOST_STOPS}
    return {
        "model": {"type": "string", "description": "base or tuned, as /v1/models lists them; missing: the first"},
        "temperature": number(0, 100, 1, "0: the likeliest token"),
        "top_p": number(0, 1, 1, "among the likeliest tokens that hold this share"),
        "top_k": whole(-1, 2**31, "among so many of the likeliest tokens; 0 and -1: all"),
        "repetition_penalty": number(0.01, 100, 1, "what tokens that were there lose"),
        "max_tokens": whole(1, 2**31, "longest answer"),
        "stop": {
            "anyOf": [TEXT | {"minLength": 1}, stops, {"type": "null"}],
            "description": "texts that end the answer",
        },
        "seed": whole(-(2**63), 2**63 - 1, "the same seed gives the same answer"),
        "stream": flag("events, as they come"),
        "stream_options": {"type": ["object", "null"], "properties": {"include_usage": flag("usage at the end")}},
        "n": {"type": ["integer", "null"], "enum": [1, None]},
        "response_format": {
            "type": ["object", "null"],
            "required": ["type"],
            "properties": {"type": {"const": "text"}},
            "description": "answers are free text",
        },
    }


def chat_body() -> Schema:
    """The body of /v1/chat/completions."""
    part = {"type": "object", "required": ["type", "text"], "properties": {"type": {"const": "text"}, "text": TEXT}}
    message = {
        "type": "object",
        "required": ["role", "content"],
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": {"anyOf": [TEXT, {"type": "array", "items": part}, {"type": "null"}]},
            "tool_calls": {"type": ["array", "null"], "items": {"type": "object"}},
            "tool_call_id": {"type": ["string", "null"]},
        },
    }
    function = {
        "type": "object", "required": ["name"],
        "properties": {"name": TEXT, "description": TEXT, "parameters": {"type": "object"}},
    }  # fmt: skip
    tool = {
        "type": "object",
        "required": ["function"],
        "properties": {"type": {"const": "function"}, "function": function},
    }
    own = {
        "messages": {"type": "array", "items": message, "minItems": 1},
        "max_completion_tokens": whole(1, 2**31, "the newer name of max_tokens"),
        "logprobs": flag("the log-probability of every token"),
        "top_logprobs": whole(0, MOST_LOGPROBS, "and so many of the likeliest beside it"),
        "tools": {"type": ["array", "null"], "items": tool, "description": "told to the model by its template"},
        "tool_choice": {"enum": ["auto", "none", None]},
        "chat_template_kwargs": {
            "type": ["object", "null"], "description": "what the chat template is told",
            "additionalProperties": {"type": ["boolean", "number", "string"]},
        },
    }  # fmt: skip
    return {"type": "object", "required": ["messages"], "properties": shared() | own}


def completion_body() -> Schema:
    """The body of /v1/completions."""
    ids = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
    texts = TEXT | {"minLength": 1}
    several = {"type": "array", "items": {"anyOf": [texts, ids]}, "minItems": 1, "maxItems": MOST_PROMPTS}
    own = {"prompt": {"anyOf": [texts, ids, several]}, "logprobs": whole(0, 20, "of each token, and of so many others")}
    return {"type": "object", "required": ["prompt"], "properties": shared() | own}


def intents_body() -> Schema:
    """The body of /v1/intents."""
    text = TEXT | {"minLength": 1, "maxLength": 10_000}
    return {
        "type": "object", "required": ["questions"], "additionalProperties": False,
        "properties": {
            "questions": {"type": "array", "items": text, "minItems": 1, "maxItems": 256},
            "top": whole(1, 50, "how many intents are named with their probability; 3"),
            "model": {"type": ["string", "null"]},
        },
    }  # fmt: skip


def feedback_body() -> Schema:
    """The body of /v1/intents/feedback."""
    names = {"question": 10_000, "intent": 200, "reply": 10_000, "predicted": 10_000}
    return {
        "type": "object", "required": ["question", "intent"], "additionalProperties": False,
        "properties": {name: TEXT | {"maxLength": most} for name, most in names.items()},
    }  # fmt: skip


def answered(about: str, kind: str = "application/json", schema: Schema | None = None) -> Schema:
    """A response."""
    return {"description": about, "content": {kind: {"schema": schema or {"type": "object"}}}}


def refused() -> Schema:
    """The responses of every route that asks the model."""
    error = {"$ref": "#/components/schemas/Error"}
    told = {
        "400": "a field that cannot be", "401": "no token", "403": "another site's page", "404": "no such model",
        "408": "the body came too slowly", "413": "too large", "415": "no JSON", "421": "an unknown host",
        "429": "too many wait; Retry-After", "503": "ending, or no time left; Retry-After",
    }  # fmt: skip
    return {status: answered(about, schema=error) for status, about in told.items()}


def operation(about: str, name: str, body: Schema | None, good: Schema) -> Schema:
    """One route's method."""
    found: Schema = {"operationId": name, "summary": about, "responses": good | refused()}
    if body:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return found


def description(model: bool, intents: bool) -> Schema:
    """The whole description, of the routes that are there."""
    both = {
        "application/json": {"schema": {"type": "object"}},
        "text/event-stream": {"schema": {"type": "object", "properties": {"data": TEXT}}},
    }
    stream = {"200": {"description": "the answer, or its events", "content": both}}
    paths: Schema = {
        "/health": {"get": operation("Whether the server is up", "health", None, {"200": answered("it is")}) | OPEN},
        "/metrics": {
            "get": operation("Numbers for Prometheus", "metrics", None, {"200": answered("", "text/plain", TEXT)})
        },
        "/v1/models": {"get": operation("The models", "models", None, {"200": answered("a list")})},
    }
    if model:
        paths |= {
            "/v1/chat/completions": {"post": operation("Answer a conversation", "chat", chat_body(), stream)},
            "/v1/completions": {"post": operation("Continue a text", "completion", completion_body(), stream)},
        }
    if intents:
        kept = {"201": answered("it is kept")}
        paths |= {
            "/v1/intents": {
                "post": operation("Intents of questions", "intents", intents_body(), {"200": answered("them")})
            },
            "/v1/intents/feedback": {"post": operation("Correct an intent", "feedback", feedback_body(), kept)},
        }
    text_or_null = {"type": ["string", "null"]}
    error = {"message": TEXT, "type": TEXT, "param": text_or_null, "code": text_or_null}
    schema = {"type": "object", "required": list(error), "properties": error}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "LLMOps",
            "version": VERSION,
            "description": "A model server for OpenAI's clients; intents of FAQ questions.",
        },
        "paths": paths,
        "components": {
            "schemas": {"Error": {"type": "object", "required": ["error"], "properties": {"error": schema}}},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}],
    }
