"""The page for people: a chat, and what the server is doing. Plain files, served as they are in this folder.

`index.html` and `style.css`; `page.js` (starts the rest), `api.js` (requests, errors in words), `conversation.js` (what
is said and shown), `status.js` with `plot.js` (numbers over time). The page holds no data, so it needs no key; its
requests carry the one that is typed into it.
"""

import functools
import hashlib
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

_FOLDER = Path(__file__).parent
_KINDS = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "page.js": "text/javascript; charset=utf-8",
    "api.js": "text/javascript; charset=utf-8",
    "conversation.js": "text/javascript; charset=utf-8",
    "status.js": "text/javascript; charset=utf-8",
    "plot.js": "text/javascript; charset=utf-8",
}
_FILES = {"/" if name == "index.html" else f"/page/{name}": name for name in _KINDS}
PATHS = frozenset(_FILES)

# Files of this server alone, nothing inline; `require-trusted-types-for` makes a browser that knows it refuse every
# assignment that would read text as HTML.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    # Browsers ask each time, and are answered 304: a new server never meets an old page.
    "cache-control": "no-cache",
}


def routes() -> list[BaseRoute]:
    """One route per file; GET and HEAD."""
    return [Route(path, functools.partial(_answer, name), name=name) for path, name in _FILES.items()]


def _answer(name: str, request: Request) -> Response:
    content = (_FOLDER / name).read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = _HEADERS | {"etag": tag}
    known = [each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")]
    if tag in known:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers | {"content-type": _KINDS[name]})
