"""Who may talk to the chat: this machine's name in Host, this page in Origin, a browser that came by a one-time link.

Host is checked against DNS rebinding, Origin and Sec-Fetch-Site against other web pages, the cookie against everything
else that can reach a local port. Pure ASGI: streams pass through untouched.
"""
from __future__ import annotations

import hmac
import json
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]

CODE_SECONDS = 600.0  # how long a one-time link may wait for its click
# No inline script or style, nothing from elsewhere; what becomes HTML must come out of DOMPurify.
CONTENT_SECURITY_POLICY = "; ".join((
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'", "connect-src 'self'",
    "font-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
    "require-trusted-types-for 'script'", "trusted-types dompurify"))
HEADERS = ((b"content-security-policy", CONTENT_SECURITY_POLICY.encode()), (b"x-content-type-options", b"nosniff"),
           (b"x-frame-options", b"DENY"), (b"referrer-policy", b"no-referrer"),
           (b"cross-origin-opener-policy", b"same-origin"), (b"cross-origin-resource-policy", b"same-origin"),
           (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"))
SAFE = ("GET", "HEAD")
STALE = ("This address belongs to an earlier start of the chat, or was opened elsewhere. Open the chat with the link "
         "that edge-runtime chat printed, or start it again: conversations and drafts are kept.")


class Gate:
    """The token of one launch: one-time codes are exchanged for it, and it comes back as a cookie."""

    def __init__(self, port: int = 0):
        self.port = port
        self._token = secrets.token_urlsafe(32)
        self.launch_secret = secrets.token_urlsafe(32)  # for a second `edge-runtime chat` of the same user
        self._codes: dict[str, float] = {}
        self._lock = threading.Lock()

    @property
    def cookie(self) -> str:
        """Its name holds the port: cookies of one host are shared by all ports."""
        return f"edge-chat-{self.port}"

    @property
    def hosts(self) -> tuple[str, ...]:
        return tuple(f"{name}:{self.port}" for name in ("127.0.0.1", "localhost", "[::1]"))

    def code(self) -> str:
        """A code for one link."""
        code = secrets.token_urlsafe(24)
        with self._lock:
            self._codes[code] = time.monotonic() + CODE_SECONDS
        return code

    def redeem(self, code: str) -> str | None:
        """The Set-Cookie header for a code that was not used before."""
        with self._lock:
            until = self._codes.pop(code, 0.0)
        if time.monotonic() > until:
            return None
        return f"{self.cookie}={self._token}; HttpOnly; SameSite=Strict; Path=/"

    def knows(self, cookies: str) -> bool:
        """Whether a Cookie header holds the token."""
        try:
            found = SimpleCookie(cookies).get(self.cookie)
        except CookieError:
            return False
        return found is not None and hmac.compare_digest(found.value.encode(), self._token.encode())


class Guard:
    """The middleware: refuses, or lets pass and adds the security headers."""

    def __init__(self, app: App, gate: Gate):
        self._app, self._gate = app, gate

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # websockets are not spoken here
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        refusal = self._refusal(scope["method"], scope["path"], headers)

        async def guarded(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
            await send(message)

        if refusal is None:
            await self._app(scope, receive, guarded)
        else:
            await _refuse(guarded, *refusal, html=scope["path"] == "/")

    def _refusal(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        gate = self._gate
        host = headers.get("host", "").lower()
        if host not in gate.hosts:
            return 421, f"This server answers to {gate.hosts[0]} only, not to {host[:80]!r}."
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if path.startswith("/open/") and method in SAFE:
            return None  # a link from anywhere: its code is the key
        if path == "/launch" and method == "POST":
            given = headers.get("x-edge-launch", "")
            ok = hmac.compare_digest(given.encode(), gate.launch_secret.encode()) and origin is None and site is None
            return None if ok else (403, "Not the owner of this chat.")
        if origin is not None and origin.lower() != f"http://{host}":
            return 403, "Other pages may not use this chat."
        if site not in (None, "same-origin", "none") or (site == "none" and method not in SAFE):
            return 403, "Other pages may not use this chat."
        if method not in SAFE and origin is None:
            return 403, "Requests that change something must come from the chat's own page (no Origin header)."
        if path.startswith("/web/") or path == "/favicon.ico":
            return None  # the page's own files, which are public
        if not gate.knows(headers.get("cookie", "")):
            return 401, STALE
        return None


async def _refuse(send: Any, status: int, message: str, *, html: bool) -> None:
    if html:
        kind, body = b"text/html; charset=utf-8", (
            f"<!doctype html><html lang=en><meta charset=utf-8><title>Edge Runtime chat</title>"
            f"<link rel=stylesheet href=/web/css/base.css><main class=refused><h1>Not this way</h1><p>{message}</p>"
            f"</main></html>").encode()
    else:
        kind, body = b"application/json", json.dumps({"error": {"message": message, "type": "Refused"}}).encode()
    await send({"type": "http.response.start", "status": status,
                "headers": [(b"content-type", kind), (b"content-length", str(len(body)).encode()),
                            (b"cache-control", b"no-store")]})
    await send({"type": "http.response.body", "body": body})
