"""Errors in the form of OpenAI's API: {"error": {"message", "type", "param", "code"}} with a status."""

from collections.abc import Mapping, Sequence
from typing import Any

import pydantic
from starlette.responses import JSONResponse

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer that is an error.

    Args:
      message: what was expected, what was found, what to do.
      status: of HTTP.
      param: the field of the request that is wrong, such as "messages[0].content".
      code: a word for programs, such as "model_not_found".
      headers: of the answer.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code, self.headers = message, status, param, code, headers

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), self.status, dict(self.headers or {}))


def overloaded(message: str) -> ApiError:
    """An error after which a client should try again."""
    return ApiError(message, 503, code="overloaded", headers={"Retry-After": "1"})


def not_supported(what: str, param: str) -> ApiError:
    """An error for a field that OpenAI's API knows and this server does not."""
    return ApiError(what, param=param, code="unsupported_parameter")


def from_validation(error: pydantic.ValidationError) -> ApiError:
    """The first problem that pydantic found in a request's body."""
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    if first["type"] == "json_invalid":
        return ApiError(f"The body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}.", code="invalid_json")
    param = path(first["loc"])
    if first["type"] == "extra_forbidden":
        return ApiError(
            f"Unknown field {param}. This server refuses what it would ignore: remove it.",
            param=param,
            code="unknown_parameter",
        )
    if first["type"] == "missing":
        return ApiError(f"The field {param} is missing.", param=param, code="missing_required_parameter")
    found = f", got {first['input']!r:.80}" if isinstance(first["input"], (str, int, float, bool)) else ""
    message = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if message != first["msg"] and first["msg"].startswith("Input"):
        message = f"expected {message}"
    where = param or "The body"
    return ApiError(f"{where}: {message}{found}.", param=param, code="invalid_value")


def path(parts: Sequence[int | str]) -> str | None:
    """The place of a field, such as "messages[0].content". None for the body itself."""
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or None
