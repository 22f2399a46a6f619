"""Opening a file with llama.cpp: its tokenizer in our shape, its template, its plan."""
from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from edge_runtime.chat_template import KEY, ChatTemplate
from edge_runtime.devices.llama_cpp import MAX_SLOTS, LlamaCppDevice, LlamaCppModel
from edge_runtime.errors import ChatTemplateError, InvalidRequestError, TokenizerError
from edge_runtime.loading import LoadedModel, fingerprint_of_file
from edge_runtime.offload.pages import PAGE_TOKENS, pages_for
from edge_runtime.offload.plan import Plan, memory

UNKNOWN, CONTROL, USER_DEFINED = 1, 8, 16  # llama_token_attr
SPM = 1  # llama_vocab_type
LLAMA_CPP_BYTES = 640 << 20  # what llama-cpp-python 0.3 holds beyond file and KV, measured with a 1B model
DEFAULT_CONTEXT = 4096  # llama.cpp takes KV for the whole context at once


def load_llama_cpp(path: Path, *, context: int | str = "auto", threads: int | None = None, max_batch: int = 32,
                   memory_budget: int | None = None) -> LoadedModel:
    """A model that llama.cpp runs. Raises MissingExtraError, ModelNotFoundError, CorruptModelError,
    UnsupportedModelError, InvalidRequestError, OutOfMemoryError."""
    model = LlamaCppModel(path)
    try:
        slots = min(max_batch, MAX_SLOTS)
        plan = plan_llama_cpp(model, context, slots, memory_budget).check()
        device = LlamaCppDevice(model, context=plan.context, slots=slots, threads=threads)
    except BaseException:
        model.close()
        raise
    tokenizer = LlamaCppTokenizer(model)
    return LoadedModel(
        device=device, tokenizer=tokenizer, context=plan.context,  # type: ignore[arg-type]
        kv_budget_bytes=(pages_for(plan.context) + 1) * slots * 4 * device.kv_layout.page_bytes, max_batch=slots,
        chat_template=_template(model, tokenizer), plan=plan, fingerprint=lambda: fingerprint_of_file(path))


def plan_file(path: Path, *, context: int | str = "auto", kv: str = "auto", max_batch: int = 32,
              memory_budget: int | None = None) -> Plan:
    """The plan for a file; `kv` is llama.cpp's own, half precision."""
    model = LlamaCppModel(path)
    try:
        return plan_llama_cpp(model, context, min(max_batch, MAX_SLOTS), memory_budget)
    finally:
        model.close()


def plan_llama_cpp(model: LlamaCppModel, context: int | str, slots: int, memory_budget: int | None) -> Plan:
    """What llama.cpp will take: the file, and half-precision KV for `slots` whole contexts."""
    total, available = memory()
    budget = memory_budget or available - max(total // 20, 256 << 20)
    page = model.kv_bytes_per_token * PAGE_TOKENS
    weights = model.path.stat().st_size
    largest = max(0, (budget - weights - LLAMA_CPP_BYTES) // max(1, page * slots)) * PAGE_TOKENS
    if context == "auto":
        context = min(model.train_context or DEFAULT_CONTEXT, DEFAULT_CONTEXT, max(largest, 256))
    if isinstance(context, bool) or not isinstance(context, int) or not 1 <= context <= max(1, model.train_context):
        raise InvalidRequestError("context", context, f"auto, or from 1 to {model.train_context}, what the model was "
                                                      f"made for")
    return Plan(
        model=model.metadata("general.name") or model.path.stem,
        architecture=model.metadata("general.architecture") or "unknown", device="llama.cpp", weights_bytes=weights,
        kv="fp16", kv_page_bytes=max(1, page), working_bytes=LLAMA_CPP_BYTES, context=context,
        model_context=model.train_context, max_context=min(largest, model.train_context), max_batch=slots,
        kv_budget_bytes=pages_for(context) * page * slots, available_bytes=available, budget_bytes=budget)


class LlamaCppTokenizer:
    """llama.cpp's own tokenizer, with the methods of `Tokenizer` that the runtime calls."""

    def __init__(self, model: LlamaCppModel):
        self._api, self._vocab, self.vocab_size = model.api, model.vocab, model.vocab_size
        prefix = model.metadata("tokenizer.ggml.add_space_prefix") != "false"
        self.strips_first_space = self._api.llama_vocab_type(self._vocab) == SPM and prefix
        self.bos_id, self.eos_id = self._id(self._api.llama_vocab_bos), self._id(self._api.llama_vocab_eos)
        self.pad_id, self.unk_id = self._id(self._api.llama_vocab_pad), None
        self.add_bos = bool(self._api.llama_vocab_get_add_bos(self._vocab))
        self.add_eos = bool(self._api.llama_vocab_get_add_eos(self._vocab))
        self._bytes: dict[int, bytes] = {}

    @cached_property
    def eog_ids(self) -> frozenset[int]:
        return frozenset(i for i in range(self.vocab_size) if self._api.llama_vocab_is_eog(self._vocab, i))

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        try:
            raw = text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f"text holds a lone surrogate at character {error.start}, which is no Unicode."
                                 ) from None
        size = len(raw) + 8
        while True:
            tokens = (ctypes.c_int32 * size)()
            count = self._api.llama_tokenize(self._vocab, raw, len(raw), tokens, size, add_special, parse_special)
            if count >= 0:
                return list(tokens[:count])
            size = -count

    def decode(self, ids: Iterable[int], skip_special: bool = True, *, start: bool = True) -> str:
        raw = b"".join(self.visible_bytes(i) if skip_special else self.token_bytes(i) for i in ids)
        if start and self.strips_first_space:
            raw = raw.removeprefix(b" ")
        return raw.decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        found = self._bytes.get(token_id)
        if found is None:
            buffer = ctypes.create_string_buffer(64)
            size = self._api.llama_token_to_piece(self._vocab, self._checked(token_id), buffer, 64, 0, True)
            if size < 0:
                buffer = ctypes.create_string_buffer(-size)
                size = self._api.llama_token_to_piece(self._vocab, token_id, buffer, -size, 0, True)
            found = self._bytes[token_id] = buffer.raw[:size]
        return found

    def visible_bytes(self, token_id: int) -> bytes:
        return b"" if self.is_special(token_id) else self.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def is_special(self, token_id: int) -> bool:
        return bool(self._attributes(token_id) & (CONTROL | UNKNOWN))

    def is_user_defined(self, token_id: int) -> bool:
        return bool(self._attributes(token_id) & USER_DEFINED)

    def _attributes(self, token_id: int) -> int:
        return int(self._api.llama_vocab_get_attr(self._vocab, self._checked(token_id)))

    def _checked(self, token_id: int) -> int:
        if not 0 <= token_id < self.vocab_size:
            raise TokenizerError(f"token id {token_id} is outside the vocabulary: ids are 0 to {self.vocab_size - 1}.")
        return int(token_id)

    def _id(self, function: object) -> int | None:
        found = int(function(self._vocab))  # type: ignore[operator]
        return found if found >= 0 else None


def _template(model: LlamaCppModel, tokenizer: LlamaCppTokenizer) -> ChatTemplate | ChatTemplateError:
    try:
        return ChatTemplate.from_metadata({KEY: model.metadata(KEY) or ""}, tokenizer)  # type: ignore[arg-type]
    except ChatTemplateError as error:
        return error.with_traceback(None)
