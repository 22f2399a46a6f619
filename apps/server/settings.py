"""What a server may be told."""
from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from edge_runtime.errors import InvalidRequestError

ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s@A-Z]+")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]", "::1")


@dataclass(frozen=True)
class ServerSettings:
    """host, port: where it listens; port 0 is any free one. api_key: asked of every request but /health; must be given
    where `host` is not this machine alone. allowed_hosts: names that the Host header may have, "*" for any; None: those
    of this machine where it listens there only, else any. allowed_origins: web pages that may call it, "*" for any.
    max_body_bytes: larger bodies are refused (413). max_requests: that run and wait at once; more are refused (429).
    stream_interval: seconds between two events of one stream at least, so that fast models do not spend their time on
    writing; the first token and the end never wait. grace_seconds: how long a shutdown waits for what runs.
    keep_responses: replies of /v1/responses that can be continued by their id, in memory."""

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] | None = None
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = 10_000_000
    max_requests: int = 1024
    stream_interval: float = 0.04
    grace_seconds: float = 30.0
    keep_responses: int = 256

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise InvalidRequestError("port", self.port, "from 0 (any free one) to 65535")
        if self.api_key is not None and not (self.api_key and self.api_key.isascii() and self.api_key.isprintable()
                                             and " " not in self.api_key):
            raise InvalidRequestError("api_key", "***", "printable ASCII without spaces, not empty")
        if self.api_key is None and not self.local:
            raise InvalidRequestError("host", self.host, "this machine (127.0.0.1) unless an API key is set: "
                                                         "anybody in the network could use the server otherwise")
        for origin in self.allowed_origins:
            if origin not in ("*", "null") and not ORIGIN.fullmatch(origin):
                raise InvalidRequestError("origin", origin, "as browsers send it: scheme://name or scheme://name:port "
                                                            "in small letters, nothing behind it; or *")
        for name in ("max_body_bytes", "max_requests"):
            if getattr(self, name) < 1:
                raise InvalidRequestError(name, getattr(self, name), "at least 1")
        for name in ("stream_interval", "grace_seconds", "keep_responses"):
            if not getattr(self, name) >= 0:
                raise InvalidRequestError(name, getattr(self, name), "at least 0")

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    @property
    def host_names(self) -> frozenset[str] | None:
        """Host header names that are answered, None for any: a name that somebody else's DNS points here is not one."""
        if self.allowed_hosts is not None:
            return None if "*" in self.allowed_hosts else frozenset(self.allowed_hosts)
        return frozenset((*LOOPBACK_NAMES, self.host)) if self.local else None
