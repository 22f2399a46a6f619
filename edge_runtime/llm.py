"""The public face: open a model, ask it."""
from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, SupportsIndex

import numpy as np

from edge_runtime import loading
from edge_runtime.arguments import (
    POOLINGS,
    begins_text,
    checked_variables,
    failed_reply,
    is_list_of_prompts,
    one_each,
    priority_of,
    processors,
    stack,
)
from edge_runtime.async_llm import AsyncCalls
from edge_runtime.chat_template import ChatTemplate, encode_chat
from edge_runtime.detokenizer import Detokenizer
from edge_runtime.early_exit import EarlyExit, ExitPlan
from edge_runtime.engine import Engine
from edge_runtime.errors import (
    ChatTemplateError,
    ContextLengthError,
    InvalidRequestError,
    TokenizerError,
)
from edge_runtime.generation import Generation, Mailbox
from edge_runtime.loading import LoadedModel
from edge_runtime.offload.plan import Plan
from edge_runtime.offload.planner import OffloadOptions
from edge_runtime.outcome import Chunk, Reply, Stats
from edge_runtime.progress import Progress, progress_of
from edge_runtime.request import Request, Sink
from edge_runtime.sampling import SamplingParams
from edge_runtime.sequence import Priority
from edge_runtime.session import Session
from edge_runtime.status import EngineStatus, status_of
from edge_runtime.structured import GrammarCompiler

__all__ = ["LLM", "Chunk", "Generation", "Reply", "Stats"]

Prompt = str | Sequence[int]
Messages = str | Sequence[Mapping[str, Any]]


class LLM(AsyncCalls):
    """A model, loaded and served by one engine thread. Safe from many threads; their requests share one batch.

    model: path of a GGUF file, or the name of a model that was pulled, such as "org/repo:Q4_0"; None: the model that
        ships with the package.
    device: "cpu"; "onnx:cpu", "webgpu", "cuda", "openvino", ... for ONNX Runtime's providers (extras of these names);
        "llama.cpp" to run the file whole through llama-cpp-python (extra `llamacpp`); "auto": a GPU that WebGPU finds,
        else the CPU.
    context: tokens of one sequence, prompt and reply; "auto": as many as the model was made for and memory holds.
        KV is taken page by page: a large context costs nothing until it is filled.
    kv: "int8" (also "auto") or "fp16"; "fp32" (also "auto") where all KV is an ONNX device's. threads: None: all
        physical cores.
    max_batch: sequences that run at once.
    offload: on ONNX devices, who holds the KV. "on": the host, which attends over what the device has no room for;
        "off": the device; "auto": the device, unless `max_batch` sequences of `context` do not fit there (`plan` says
        why). The first time, what this machine takes for the model is measured, for some twenty seconds.
    device_memory: bytes of the device's memory that may be used; None: what it has free, where it tells.
    tbt_ms: milliseconds between two tokens of an interactive request that work in bulk must leave it; offloads.
    host_threads, host_cores, device_cores: with offload, threads of the host's attention, and processors that these and
        the device's own threads stay on.
    early_exit: how tokens of every reply may leave the network early (`EarlyExit`, or "verify", "recompute",
        "propagate"), unless its SamplingParams say otherwise. None: every token runs all layers.
    exit_layers: layers after which tokens may leave; None: those that the model was trained for. A warning tells where
        it was not.
    memory_budget: bytes for weights, KV and working memory; None: what is free now, less a reserve.
    progress: called while kernels compile and weights are packed, as the device documents.

    An open model has `context` (tokens of one sequence), `plan` (a `Plan`; None on a device of one's own), `config`
    (its architecture and sizes), `exit_layers`, `tokenizer`. Close it, or use it in `with`.

    Raises ModelNotFoundError, CorruptModelError, UnsupportedModelError, TokenizerError for the file, OutOfMemoryError
    with the plan where it does not fit, InvalidRequestError for the arguments, MissingExtraError.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, *, device: str = "auto",
                 context: int | str = "auto", kv: str = "auto", threads: int | None = None, max_batch: int = 32,
                 memory_budget: int | None = None, early_exit: EarlyExit | str | Mapping[str, Any] | None = None,
                 exit_layers: Sequence[int] | None = None, offload: str = "auto", device_memory: int | None = None,
                 tbt_ms: float | None = None, host_threads: int | None = None, host_cores: Sequence[int] = (),
                 device_cores: Sequence[int] = (), progress: Any = None):
        early = EarlyExit.of(early_exit)
        if early is not None and device == "auto":
            device = "cpu"  # the one device that has exits
        loaded = loading.load(model, device=device, context=context, kv=kv, threads=threads, max_batch=max_batch,
                              memory_budget=memory_budget, exit_layers=exit_layers, progress=progress,
                              offload=OffloadOptions(offload, device_memory, tbt_ms, host_threads,
                                                     processors("host_cores", host_cores),
                                                     processors("device_cores", device_cores)))
        try:
            self._start(loaded, early)
        except BaseException:
            loaded.close()
            raise

    @classmethod
    def from_loaded(cls, loaded: LoadedModel) -> LLM:
        """An LLM on a device of your own."""
        llm = cls.__new__(cls)
        llm._start(loaded)
        return llm

    @staticmethod
    def plan_for(model: str | os.PathLike[str] | None = None, *, device: str = "auto", context: int | str = "auto",
                 kv: str = "auto", max_batch: int = 32, memory_budget: int | None = None, offload: str = "auto",
                 device_memory: int | None = None, tbt_ms: float | None = None) -> Plan:
        """The plan that `LLM(...)` would follow, from the file's metadata, with nothing loaded. Raises
        OutOfMemoryError (its `plan` is the plan) where it does not fit."""
        return loading.plan(model, device=device, context=context, kv=kv, max_batch=max_batch,
                            memory_budget=memory_budget,
                            offload=OffloadOptions(offload, device_memory, tbt_ms)).check()

    def _start(self, loaded: LoadedModel, early_exit: EarlyExit | None = None) -> None:
        self._loaded = loaded
        self.exit_layers: tuple[int, ...] = getattr(loaded.device, "exit_layers", ())
        self._exit_plans: dict[tuple[Any, ...], ExitPlan] = {}
        self.early_exit = early_exit
        self.tokenizer, self.plan, self.config = loaded.tokenizer, loaded.plan, loaded.config
        self.context = loaded.context
        if early_exit is not None:
            self._exit_plan(early_exit)
        self._grammars = GrammarCompiler(loaded.tokenizer, loaded.device.vocab_size)
        self.engine = Engine(
            loaded.device, kv_budget_bytes=loaded.kv_budget_bytes, context=loaded.context,
            end_ids=loaded.tokenizer.eog_ids, max_batch=loaded.max_batch)
        # The engine's thread keeps the engine alive, not the LLM: one that is dropped closes itself.
        self._finalizer = weakref.finalize(self, _close, self.engine, loaded)
        self._finalizer.atexit = False  # the engine sees to that itself, and does not wait for ever

    # Text to text

    def generate(self, prompts: Prompt | Sequence[Prompt],
                 params: SamplingParams | Sequence[SamplingParams] | None = None, *, stream: bool = False,
                 progress: bool | Progress = False, priority: Priority | str | None = None,
                 **overrides: Any) -> Any:
        """Continue a prompt (Reply) or a list of prompts (list of Reply in the same order, computed as one batch).

        A prompt is text, in which names of special tokens count as those tokens and which gets the model's BOS, or a
        list of token ids, taken as they are. params: for all, or one each; overrides: single values of them.
        stream: a `Generation`, which yields chunks; one prompt only. progress: a bar, or called with (done, total).
        priority: "interactive" (one prompt) and "batch" (lists) unless given.

        Raises InvalidRequestError, ContextLengthError, TokenizerError before anything runs; NumericalError,
        DeviceError, EngineStoppedError for one prompt. In a list, a prompt that fails while it runs becomes a reply
        with finish_reason "error", so that the others are not lost.
        """
        many = is_list_of_prompts(prompts)
        urgency = priority_of(priority, Priority.BATCH if many else Priority.INTERACTIVE)
        if not many:
            ids = self._prompt_ids(prompts)
            one = one_each(params, 1, overrides)[0]
            if stream:
                return self._stream(ids, one, priority=urgency, fresh=False)
            return self._reply(ids, one, priority=urgency, fresh=False)
        if stream:
            raise InvalidRequestError("stream", True, "used with one prompt, not with a list")
        all_ids = [self._prompt_ids(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
        each = one_each(params, len(all_ids), overrides)
        with progress_of(progress, len(all_ids)) as advance:
            return self._replies(all_ids, each, urgency, advance)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, *,
               priority: Priority | str | None = None, **overrides: Any) -> Generation:
        """`generate(prompt, stream=True)`: chunks of the reply as it is written. Raises as `generate` does; errors
        while it runs come out of the iteration."""
        found: Generation = self.generate(prompt, params, stream=True, priority=priority, **overrides)
        return found

    def chat(self, messages: Messages, params: SamplingParams | None = None, *, stream: bool = False,
             tools: Sequence[Mapping[str, Any]] | None = None, template: Mapping[str, Any] | None = None,
             priority: Priority | str | None = None, **overrides: Any) -> Any:
        """Reply to a conversation, rendered with the model's own chat template: a Reply, or a `Generation` of chunks
        where `stream`.

        messages: dicts with role and content, or the text of one user message. params, overrides, priority: as
        `generate` takes them. tools: JSON schemas for templates that
        know tools. template: further variables of the template, such as {"enable_thinking": False};
        {"continue_final_message": True} goes on with the last message instead of opening a new one.
        Raises what `generate` raises, and ChatTemplateError.
        """
        ids = self._chat_ids(messages, tools, template)
        one, urgency = one_each(params, 1, overrides)[0], priority_of(priority, Priority.INTERACTIVE)
        if stream:
            return self._stream(ids, one, priority=urgency, fresh=begins_text(template))
        return self._reply(ids, one, priority=urgency, fresh=begins_text(template))

    def chat_prompt(self, messages: Messages, *, tools: Sequence[Mapping[str, Any]] | None = None,
                    template: Mapping[str, Any] | None = None) -> list[int]:
        """Token ids of a conversation that waits for its reply, as `chat` would send it: what `generate` takes, so that
        many conversations make one batch. Raises ChatTemplateError."""
        ids: list[int] = self._chat_ids(messages, tools, template).tolist()
        return ids

    # Text to vectors and tokens

    def embed(self, texts: str | Sequence[str], pooling: str = "mean", normalize: bool = True, *,
              priority: Priority | str | None = None) -> np.ndarray:
        """float32 [len(texts), width] ([width] for one string): final hidden states of texts, or of lists of token ids.

        pooling: "mean" over the tokens, or that of the "last" one. normalize: vectors of length 1, whose dot product is
        the cosine. Raises as `generate` does."""
        if pooling not in POOLINGS:
            raise InvalidRequestError("pooling", pooling, " or ".join(POOLINGS))
        single = isinstance(texts, str)
        mailbox = Mailbox(self.engine)
        requests = self._embed_requests([texts] if single else texts, pooling, priority, mailbox.put)
        vectors: dict[int, np.ndarray] = {}
        for request, outcome in self._outcomes(requests, mailbox):
            if isinstance(outcome, BaseException):
                raise outcome
            vectors[request.index] = outcome
        return stack(vectors, single, normalize)

    def score(self, texts: Sequence[Prompt], *, priority: Priority | str | None = None) -> list[np.ndarray]:
        """Log-probabilities of texts under the model, float32 [n] each: of every token given those before it; the
        first, which has none before it, is NaN. A text is as `generate` takes a prompt: special tokens by name, and
        the model's BOS before it; or token ids. Their negatives are the tokens' self-information in nats. Raises as
        `generate` does."""
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise InvalidRequestError("texts", texts, "a list of strings, or of lists of token ids")
        urgency = priority_of(priority, Priority.INTERACTIVE if len(texts) == 1 else Priority.BATCH)
        mailbox = Mailbox(self.engine)
        requests = [self._request(self._prompt_ids(text, f"texts[{i}]"), SamplingParams(max_tokens=0), mailbox.put,
                                  score=True, priority=urgency, index=i) for i, text in enumerate(texts)]
        found: dict[int, np.ndarray] = {}
        for request, outcome in self._outcomes(requests, mailbox):
            if isinstance(outcome, BaseException):
                raise outcome
            found[request.index] = outcome
        return [found[i] for i in range(len(requests))]

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of a text, with BOS and EOS as the model file asks where `add_special`; `parse_special` reads the
        names of special tokens as those tokens."""
        return self.tokenizer.encode(text, add_special, parse_special)

    def detokenize(self, token_ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of token ids. Raises TokenizerError for an id outside the vocabulary."""
        return self.tokenizer.decode(token_ids, skip_special)

    # Conversations that keep their KV

    def session(self) -> Session:
        """A conversation whose KV stays computed between requests; see `Session`."""
        return Session(self)

    def load_session(self, path: str | os.PathLike[str]) -> Session:
        """A session that `Session.save` wrote, with this very model. Raises SessionFileError."""
        return Session.load(self, path)

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The model's own, None where it has none."""
        found = self._loaded.chat_template
        return found if isinstance(found, ChatTemplate) else None

    # Life

    def status(self) -> EngineStatus:
        """What the engine does now: batch, queue, KV pages, and who attends. From any thread, at once."""
        return status_of(self.engine)

    def close(self) -> None:
        """End the engine and free the model. Requests that still run end with EngineStoppedError."""
        self._finalizer()

    @property
    def fingerprint(self) -> str:
        """Names the weights: the same for the same file, wherever it lies; "" where a device of one's own has none."""
        return self._loaded.fingerprint()

    @property
    def closed(self) -> bool:
        """Whether it was closed: every call raises EngineStoppedError then."""
        return not self._finalizer.alive

    def __enter__(self) -> LLM:
        return self

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError("An LLM cannot be copied or pickled: open the model in each process, and share it between "
                        "threads.")

    def __exit__(self, *_: object) -> None:
        self.close()

    # What this class, its sessions and its async twins share

    def _prompt_ids(self, prompt: Any, name: str = "prompt") -> np.ndarray:
        """int32 [n], checked against vocabulary and emptiness."""
        if isinstance(prompt, str):
            return self._checked_ids(self.tokenizer.encode(prompt, add_special=True, parse_special=True), name, prompt)
        flat = isinstance(prompt, np.ndarray) and prompt.ndim == 1
        if not (flat or isinstance(prompt, Sequence)) or isinstance(prompt, bytes | bytearray):
            raise InvalidRequestError(name, prompt, "a string or a list of token ids")
        for token in prompt:
            if type(token) is not int and not isinstance(token, np.integer):
                raise InvalidRequestError(name, token, "a string or a list of token ids (whole numbers)")
        return self._checked_ids(prompt, name, prompt)

    def _checked_ids(self, ids: Any, name: str, shown: Any) -> np.ndarray:
        if len(ids) == 0:
            raise InvalidRequestError(name, shown, "at least one token: this model puts no BOS before a prompt")
        low, high, limit = min(ids), max(ids), self._loaded.device.vocab_size
        if low < 0 or high >= limit:
            raise TokenizerError(f"{name} holds token id {low if low < 0 else high}, outside the vocabulary: ids are 0 "
                                 f"to {limit - 1}.")
        return np.asarray(ids, np.int32)

    def _chat_ids(self, messages: Messages, tools: Any = None, template: Mapping[str, Any] | None = None) -> np.ndarray:
        chat = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        ids = encode_chat(self.tokenizer, self._template().render(chat, tools=tools, **checked_variables(template)))
        if not ids:
            raise ChatTemplateError("The model's chat template made an empty prompt of the messages. Use generate() "
                                    "with a prompt written out.")
        return np.asarray(ids, np.int32)

    def _template(self) -> ChatTemplate:
        found = self._loaded.chat_template
        if isinstance(found, ChatTemplate):
            return found
        raise ChatTemplateError(str(found or "The model has no chat template. Use generate() with a prompt."))

    def _request(self, ids: np.ndarray, params: SamplingParams, sink: Sink, *, fresh: bool = False,
                 **options: Any) -> Request:
        """fresh: the reply begins a text (a chat's), rather than continuing one."""
        self.engine.check_open()
        params.check_vocabulary(self._loaded.device.vocab_size)
        needed = 0 if params.max_tokens == 0 or options.get("embed") else 1
        if len(ids) + needed > self.context:
            raise ContextLengthError(len(ids), self.context, needed if len(ids) <= self.context else 0)
        mask = None if params.grammar is None else self._grammars.compile(params.grammar)
        early = self.early_exit if params.early_exit is None else params.early_exit
        plan = self._exit_plan(early) if isinstance(early, EarlyExit) and needed else None
        return Request(ids, params, sink, decoder=Detokenizer(self.tokenizer, start=fresh), mask=mask, exit=plan,
                       **options)

    def _exit_plan(self, early: EarlyExit) -> ExitPlan:
        key = (early.missing_kv, early.criterion, early.layer, early.max_pending, early.max_draft,
               None if early.thresholds is None else tuple(early.thresholds.items()))
        if key not in self._exit_plans:
            if not hasattr(self._loaded.device, "speculate"):
                raise InvalidRequestError("early_exit", early.missing_kv, "None on this device: it runs all layers of "
                                          'every token. device="cpu" can leave early')
            layers = self.config.layers if self.config is not None else 0
            calibrated = None
            if early.thresholds is None and not early.drafts and early.criterion != "layer":
                from edge_runtime import calibration_store

                calibrated = calibration_store.load(self._loaded.fingerprint(), early.criterion, early.missing_kv,
                                                    self.exit_layers)
            self._exit_plans[key] = ExitPlan.of(early, self.exit_layers, layers, calibrated)
        return self._exit_plans[key]

    def _stream(self, ids: np.ndarray, params: SamplingParams, *, fresh: bool, on_end: Any = None,
                **options: Any) -> Generation:
        mailbox = Mailbox(self.engine)
        request = self._request(ids, params, mailbox.put, fresh=fresh, streaming=True, **options)
        self.engine.submit(request)
        return Generation(self.engine, request, mailbox, on_end)

    def _reply(self, ids: np.ndarray, params: SamplingParams, *, fresh: bool, **options: Any) -> Reply:
        mailbox = Mailbox(self.engine)
        request = self._request(ids, params, mailbox.put, fresh=fresh, **options)
        for _, outcome in self._outcomes([request], mailbox):
            if isinstance(outcome, BaseException):
                raise outcome
            reply: Reply = outcome
        return reply

    def _replies(self, all_ids: list[np.ndarray], each: list[SamplingParams], priority: Priority,
                 advance: Callable[[], None]) -> list[Reply]:
        mailbox = Mailbox(self.engine)
        requests = [self._request(ids, params, mailbox.put, priority=priority, index=i)
                    for i, (ids, params) in enumerate(zip(all_ids, each))]
        replies: dict[int, Reply] = {}
        for request, outcome in self._outcomes(requests, mailbox):
            replies[request.index] = failed_reply(request, outcome)
            advance()
        return [replies[i] for i in range(len(requests))]

    def _outcomes(self, requests: list[Request], mailbox: Mailbox) -> Iterator[tuple[Request, Any]]:
        """Submit, and yield outcomes as they come; whatever goes wrong here, nothing is left running."""
        try:
            for request in requests:
                self.engine.submit(request)
            for _ in requests:
                yield mailbox.take()
        finally:
            for request in requests:
                if not request.finished:
                    self.engine.cancel(request)

    def _embed_requests(self, texts: Any, pooling: str, priority: Priority | str | None, sink: Sink) -> list[Request]:
        if not isinstance(texts, Sequence):
            raise InvalidRequestError("texts", texts, "a string or a list of strings")
        urgency = priority_of(priority, Priority.INTERACTIVE if len(texts) == 1 else Priority.BATCH)
        return [self._request(
            self._checked_ids(self.tokenizer.encode(text), f"texts[{i}]", text) if isinstance(text, str)
            else self._prompt_ids(text, f"texts[{i}]"), SamplingParams(max_tokens=0), sink,
            embed=pooling, priority=urgency, index=i) for i, text in enumerate(texts)]


def _close(engine: Engine, loaded: LoadedModel) -> None:
    engine.close()
    loaded.close()
    engine.device = loaded.device
