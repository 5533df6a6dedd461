"""What the page's server answers at all, and to whom: in front of gradio's own checks, not in place of them.

gradio serves much more than this page uses: fetching an address for the browser, streams, other people's components,
monitoring. Here an address is refused unless it is on a short list; a file, unless it is a picture that truly lies
(links followed) in one of the page's own folders; a request, unless it comes from this page.
"""

from __future__ import annotations

import ipaddress
import json
import os
import posixpath
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

API, FILE = "/gradio_api", "/gradio_api/file="
EXACT = {
    "/", "/config", "/theme.css", "/favicon.ico", "/login", "/logout",
    *(API + name for name in (
        "/queue/join", "/queue/data", "/upload", "/upload_progress", "/cancel", "/reset", "/component_server",
        "/startup-events",
    )),
}  # fmt: skip
UNDER = ("/assets/", "/static/", f"{API}/heartbeat/")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
BODY = 2**20  # of a request that is no upload
UPLOAD = 32 * 2**20
POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'"  # nothing from outside
HEADERS = [
    (b"content-security-policy", POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]  # fmt: skip


class Guard:
    """ASGI middleware.

    Args:
        folders: the only ones that files are read from.
        hosts: names by which the page may be called; None is any. A page that listens on loopback without a password
            must be called by loopback's names, else any web site could read it by a name of its own that it points
            here ("DNS rebinding").
    """

    def __init__(self, app: App, folders: Sequence[Path], hosts: Sequence[str] | None = None):
        self.app, self.folders, self.hosts = app, [Path(os.path.realpath(x)) for x in folders], hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close"})
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if problem := self._stranger(headers):
            return await _refuse(send, 403, problem)
        if not self._known(scope["path"]):
            return await _refuse(send, 404, "not here")
        if scope["method"] in ("POST", "PUT", "PATCH"):
            if scope["path"] in (f"{API}/upload", f"{API}/component_server"):
                # not held here: gradio asks for the password before it reads
                if (length := _length(headers)) is None:
                    return await _refuse(send, 411, "of unknown length")
                if length > UPLOAD:
                    await _thrown_away(receive, UPLOAD)  # else a browser that still sends sees no answer
                    return await _refuse(send, 413, "too large")
            else:
                body = await _body(receive, BODY)
                if body is None:
                    return await _refuse(send, 413, "too large")
                if not self._paths_are_ours(body):
                    return await _refuse(send, 403, "a file that was not uploaded here")
                receive = _again(body, receive)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *HEADERS]}
            await send(message)

        await self.app(scope, receive, with_headers)

    def _stranger(self, headers: dict[str, str]) -> str | None:
        """Why the request is not one of this page's own."""
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            if self.hosts is not None and (urlsplit(f"//{host}").hostname or "") not in self.hosts:
                return "called by a name that is not this page's"
            if origin is not None and urlsplit(origin).netloc != host:
                return "from another page"
        except ValueError:  # no address at all
            return "called by a name that is none"
        return None

    def _known(self, path: str) -> bool:
        """``path`` is decoded once, by the server, as gradio sees it."""
        if path.startswith(FILE):
            return self.ours(path.removeprefix(FILE))
        clean = posixpath.normpath(path) == path.rstrip("/") or path == "/"
        return clean and (path in EXACT or path.startswith(UNDER))

    def ours(self, name: str) -> bool:
        """Is it a picture in one of the folders, by its full name, with links followed?"""
        if "\0" in name or "%" in unquote(name) or not os.path.isabs(name) or ".." in Path(name).parts:
            return False
        try:
            true = Path(os.path.realpath(name))
            inside = any(true.is_relative_to(folder) for folder in self.folders)
            return inside and true.suffix.lower() in PICTURES and true.is_file()
        except (OSError, ValueError):  # too long, or no name that a disk can hold
            return False

    def _paths_are_ours(self, body: bytes) -> bool:
        """Whether the files that a request names were uploaded here: gradio would fetch an address that it is given."""
        try:
            sent = json.loads(body or b"{}")
        except (ValueError, RecursionError):
            return True  # a login form, or nothing that gradio will read
        return all(path is None or (isinstance(path, str) and self.ours(path)) for path in _paths(sent))


def _paths(value: Any) -> Iterator[Any]:
    """Every value of a key ``path``, at any depth."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            if "path" in item:
                yield item["path"]
            left.extend(item.values())
        elif isinstance(item, list):
            left.extend(item)


def _length(headers: dict[str, str]) -> int | None:
    """Of the body, which the server holds a client to; None where it is not said."""
    said = headers.get("content-length", "")
    return int(said) if said.isascii() and said.isdecimal() and "transfer-encoding" not in headers else None


async def _thrown_away(receive: Receive, limit: int) -> None:
    """Read on, and keep nothing, to the end or to ``limit`` bytes and one message more."""
    more = True
    while more and limit >= 0:
        message = await receive()
        limit -= len(message.get("body", b""))
        more = message["type"] != "http.disconnect" and message.get("more_body", False)


async def _body(receive: Receive, limit: int) -> bytes | None:
    """The whole body, or None where it is longer than that."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > limit:
            return None
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body once more, then what comes after it."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _refuse(send: Send, status: int, why: str) -> None:
    text = json.dumps({"detail": why}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(text)).encode()), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_address(host: str, password: str | None, no_password: bool) -> None:
    """Raises ValueError where the page would be open to a network that nobody said it may be open to."""
    if password is not None and no_password:
        raise ValueError("--no-password: there is a password; give one of the two")
    if password is not None and len(password) < 8:
        raise ValueError("password: shorter than 8 characters")
    if not is_loopback(host) and password is None and not no_password:
        raise ValueError(
            f"--host {host}: others than this machine can reach it, so it needs a password: set LDM_APP_PASSWORD, or "
            f"give --password-file FILE or --ask-password (--no-password, if everybody there may draw)"
        )
