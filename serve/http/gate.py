"""What is looked at before a body is read: the key, and the size."""

import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.http.errors import ApiError
from serve.http.page import PATHS

OPEN_PATHS = PATHS | {"/health", "/metrics"}


class Gate:
    """ASGI middleware that answers 401 without a right key and 413 to a body that is too large."""

    def __init__(self, app: ASGIApp, *, api_keys: Sequence[str], max_body_bytes: int):
        """Args: no `api_keys` lets everyone in."""
        self._app, self._max = app, max_body_bytes
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if self._keys and scope["path"] not in OPEN_PATHS and not self._is_known(headers):
            error = ApiError(
                401, "the API key is missing or wrong: send Authorization: Bearer KEY", code="invalid_api_key"
            )
            await error.response({"www-authenticate": "Bearer"})(scope, receive, send)
            return
        if int(headers.get("content-length", 0)) > self._max:
            await self._too_large().response({"connection": "close"})(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max:
                # Without the hint the rest would be read after all, to get at the connection's next request.
                raise HTTPException(413, self._too_large().message, {"connection": "close"})
            return message

        await self._app(scope, counted, send)

    def _is_known(self, headers: Headers) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        # Every key is compared in constant time, whichever is right.
        matches = [hmac.compare_digest(given.strip().encode(), key) for key in self._keys]
        return kind.lower() == "bearer" and any(matches)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body exceeds {self._max:,} bytes", code="body_too_large")
