"""Who answers: OpenAI-compatible servers that run already, several of them, the one with the least to do first."""
from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge_runtime.apps.summarizer.asks import Answer, Ask
from edge_runtime.apps.summarizer.backend import LocalBackend, Tick
from edge_runtime.apps.summarizer.errors import RequestRefusedError, ServerError, ServersUnreachableError
from edge_runtime.errors import CancelledError, InvalidRequestError, MissingExtraError
from edge_runtime.sampling import SamplingParams

SLOTS = 16  # requests at once for each server, where nobody says
PATIENCE = 60.0  # seconds without any answer before the job stops
PAUSES = (0.2, 1.0, 3.0, 10.0, 30.0)  # seconds that a server which failed so many times in a row is left alone
TIMEOUT = 600.0  # seconds for one answer: long replies on slow machines
CONTEXT = 4096  # where neither the caller nor the server says
TEMPLATE_TOKENS = 64  # of a chat template around a message, whose text we do not know


@dataclass
class Server:
    """url: up to and with /v1. running: requests sent to it now; failures: in a row."""

    url: str
    running: int = 0
    failures: int = 0
    rests_until: float = 0.0


class ServerBackend:
    """See `backend.Backend`. urls: "http://host:port" or with "/v1". tokenizer: counts tokens and scores sentences; a
    local model, as like the servers' as may be. model: its name on the servers; None: the first that they list.
    context: None: as the servers tell. Raises MissingExtraError, ServersUnreachableError, InvalidRequestError."""

    def __init__(self, urls: Sequence[str], tokenizer: LocalBackend, *, model: str | None = None,
                 context: int | None = None, api_key: str | None = None, slots: int = SLOTS,
                 patience: float = PATIENCE):
        try:
            import httpx
        except ImportError as error:
            raise MissingExtraError("httpx", "documents", "--server") from error
        if slots < 1:
            raise InvalidRequestError("concurrency", slots, "1 or more")
        self._httpx: Any = httpx
        self._local = tokenizer
        self.servers = [Server(_base(url)) for url in urls]
        for url in urls:
            try:
                httpx.URL(url)
            except httpx.InvalidURL as error:
                raise InvalidRequestError("server", url, f"a URL such as http://127.0.0.1:8000 ({error})") from error
        self.slots = slots * len(self.servers)
        self.patience = patience
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=2 * self.slots + 4, max_keepalive_connections=2 * self.slots + 4)
        self._client = httpx.Client(headers=headers, limits=limits, timeout=httpx.Timeout(TIMEOUT, connect=5.0))
        self._condition = threading.Condition()
        self._answered = time.monotonic()
        self._reason = "nothing"
        try:
            listed = self._models()
            self.model = model or str(listed.get("id") or "default")
            ours = listed.get("edge_runtime")
            self.bundled = model is None and isinstance(ours, dict) and ours.get("source") == "bundled"
            self.identity = f"{self.model} on servers, scored by {tokenizer.identity}"
            self.context = context or _context_of(listed) or CONTEXT
        except BaseException:
            self.close()
            raise

    def count(self, text: str) -> int:
        return self._local.count(text)

    def overhead(self, prompt: str) -> int:
        return self._local.count(prompt) + TEMPLATE_TOKENS

    def units(self, sentences: Sequence[str]) -> list[list[int]]:
        return self._local.units(sentences)

    def ask(self, ask: Ask, stop: threading.Event, tick: Tick) -> Answer:
        if ask.kind == "score":
            return self._local.ask(ask, stop, tick)
        path, body = self._wire(ask)
        began = time.perf_counter()
        found = self._send("POST", path, body, stop)
        choices = found.get("choices")
        if path.endswith("/completions") and not (isinstance(choices, list) and choices):
            raise ServerError(f"the answer holds no choices: {json.dumps(found)[:200]}")
        usage = _mapping(found.get("usage"))
        details = _mapping(usage.get("prompt_tokens_details"))
        text, reason = _reply(found) if ask.kind in ("chat", "complete", "post") else ("", "stop")
        return Answer(text, reason, _number(usage, "prompt_tokens"), _number(usage, "completion_tokens"),
                      _number(details, "cached_tokens"), time.perf_counter() - began,
                      body=found if ask.kind == "post" else None)

    def close(self) -> None:
        self._client.close()

    def _wire(self, ask: Ask) -> tuple[str, dict[str, Any]]:
        if ask.kind == "post":
            path, body = ask.content
            return str(path).removeprefix("/v1"), {**body, "model": self.model}
        if ask.kind != "chat":
            raise InvalidRequestError("kind", ask.kind, "chat, post or score for servers")
        assert ask.params is not None
        return "/chat/completions", {"model": self.model, "messages": ask.content, **_body(ask.params)}

    def _models(self) -> dict[str, Any]:
        """The first model that a server lists."""
        rows = self._send("GET", "/models", None, threading.Event()).get("data")
        return rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else {}

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None, stop: threading.Event) -> dict[str, Any]:
        """The answer of whichever server gives one. Servers that cannot be reached, are busy or fail are left alone for
        a while; a request that one failed at by itself (5xx) is tried as often as there are pauses."""
        own_failures = 0
        while True:
            server = self._choose(stop)
            failed: str | None = None
            try:
                response = self._client.request(method, server.url + path, json=body)
                status = response.status_code
                if status in (408, 409, 425, 429) or status >= 500:
                    failed = f"{server.url}: HTTP {status}: {_message(response)}"
                    own_failures += status >= 500 and status not in (502, 503, 504)
                elif status >= 400:
                    raise RequestRefusedError(f"{server.url} refused the request (HTTP {status}): {_message(response)}")
                else:
                    found = _json(response)
                    if found is not None:
                        self._answered = time.monotonic()
                        return found
                    failed = f"{server.url}: the answer is not a JSON object"
                    own_failures += 1
            except self._httpx.HTTPError as error:
                failed = f"{server.url}: {type(error).__name__}: {error}"
            except RuntimeError as error:  # the client was closed under a request
                raise CancelledError("cancelled") from error
            finally:
                self._release(server, failed)
            if own_failures >= len(PAUSES):
                raise ServerError(failed)

    def _choose(self, stop: threading.Event) -> Server:
        """The awake server with the fewest requests; waits where all rest."""
        waited_from = time.monotonic()
        with self._condition:
            while True:
                if stop.is_set():
                    raise CancelledError("cancelled")
                now = time.monotonic()
                awake = [server for server in self.servers if server.rests_until <= now]
                if awake:
                    chosen = min(awake, key=lambda server: server.running)
                    chosen.running += 1
                    return chosen
                if now - max(self._answered, waited_from - self.patience) > self.patience and all(
                        server.failures > 1 for server in self.servers):
                    raise ServersUnreachableError([server.url for server in self.servers], self.patience, self._reason)
                self._condition.wait(min(0.2, max(0.01, min(server.rests_until for server in self.servers) - now)))

    def _release(self, server: Server, failed: str | None) -> None:
        with self._condition:
            server.running -= 1
            if failed is None:
                server.failures, server.rests_until = 0, 0.0
            else:
                self._reason = failed
                pause = PAUSES[min(server.failures, len(PAUSES) - 1)]
                if server.rests_until <= time.monotonic():  # of requests that fail together, one counts
                    server.failures += 1
                    server.rests_until = time.monotonic() + pause
            self._condition.notify_all()


def _base(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise InvalidRequestError("server", url, "a URL such as http://127.0.0.1:8000")
    url = url.rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"


def _context_of(model: Mapping[str, Any]) -> int | None:
    """As servers tell it: ours, vLLM, others, llama.cpp."""
    ours, meta = (found if isinstance(found := model.get(name), dict) else {} for name in ("edge_runtime", "meta"))
    told = [ours.get("context"), model.get("max_model_len"), model.get("context_length"), model.get("context"),
            meta.get("n_ctx"), meta.get("n_ctx_train")]
    return next((value for value in told if isinstance(value, int) and value > 0), None)


def _body(params: SamplingParams) -> dict[str, Any]:
    """OpenAI's names; what they have no name for is left out where it is off."""
    body: dict[str, Any] = {"max_tokens": params.max_tokens, "temperature": params.temperature,
                            "top_p": params.top_p, "seed": params.seed, "stop": list(params.stop) or None,
                            "presence_penalty": params.presence_penalty or None,
                            "frequency_penalty": params.frequency_penalty or None}
    return {name: value for name, value in body.items() if value is not None}


def _reply(found: Mapping[str, Any]) -> tuple[str, str]:
    """(text, finish_reason) of a completion's first choice; ("", "stop") where there is none."""
    choices = found.get("choices")
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    message = first.get("message") if isinstance(first.get("message"), dict) else {}
    text = (message or {}).get("content") or first.get("text") or ""
    return str(text), str(first.get("finish_reason") or "stop")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    return value if isinstance(value, int) else 0


def _json(response: Any) -> dict[str, Any] | None:
    try:
        found = response.json()
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _message(response: Any) -> str:
    try:
        error = response.json().get("error")
        text = error.get("message") if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = response.text
    return " ".join(str(text).split())[:300]
