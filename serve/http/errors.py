"""Errors as OpenAI's clients expect them."""

import json
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.responses import Response

KINDS = {401: "authentication_error", 429: "rate_limit_error", 499: "client_closed_request"}


class Problem(BaseModel):
    """What is wrong, for the OpenAPI document; `ApiError` says the same."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An error's JSON, for the OpenAPI document."""

    error: Problem


class ApiError(Exception):
    """A request that is answered by an error.

    Attributes:
        status: HTTP status.
        message: one sentence that names what was given and what is allowed.
        param: the request's field at fault.
        code: a word for programs.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        """The answer; who came at a bad time is told when to come back."""
        retry = {"retry-after": "1"} if self.status in (429, 503) else {}
        # Python's default escapes everything outside ASCII, so that a stray surrogate cannot break the answer.
        content = json.dumps(self.body())
        return Response(content, self.status, {**retry, **(headers or {})}, media_type="application/json")


def from_validation(error: RequestValidationError) -> ApiError:
    """The first thing wrong with a body."""
    first = error.errors()[0]
    kind, place, message = first["type"], [str(part) for part in first["loc"]], str(first["msg"])
    param = place[1] if len(place) > 1 else None
    if kind == "json_invalid":
        reason = first.get("ctx", {}).get("error", message)
        return ApiError(400, f"malformed JSON at character {param}: {reason}", code="invalid_json")
    if kind == "extra_forbidden":
        return ApiError(400, f"unknown parameter {'.'.join(place[1:])!r}", param=param, code="unknown_parameter")
    if kind == "unsupported":
        return ApiError(400, message, param=first["ctx"]["param"], code="unsupported_parameter")
    if kind == "invalid":
        return ApiError(400, message, param=first["ctx"]["param"], code="invalid_value")
    if param is None:
        message = f"{message} (send a JSON object, with Content-Type: application/json)"
    return ApiError(400, f"{'.'.join(place[1:]) or 'body'}: {message}", param=param, code="invalid_type")
