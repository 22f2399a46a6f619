"""A model that llama.cpp runs whole, through llama-cpp-python: the way out for what the CPU device cannot compute.

llama.cpp keeps the KV itself. Our pages hold only the token ids: each step reads a sequence's history back from them
and brings one of llama.cpp's own sequences ("slots") to that state, computing what it lacks. So everything that the
engine does with pages (sharing, forking, preempting, saving) stays right; it is only less fast than with real KV.
"""
from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edge_runtime.devices.base import PAGE_TOKENS, KVLayout, SequenceSlice, Step, StepResult
from edge_runtime.errors import (
    CorruptModelError,
    DeviceError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from edge_runtime.kernels.isa import host_features
from edge_runtime.models.llama_cpp_bindings import bindings, forget_errors, last_error

HISTORY_LAYOUT = KVLayout(layers=1, kv_heads=1, head_size=16)  # the smallest page: 256 of its bytes hold token ids
MAX_ROWS = 512
MAX_SLOTS = 4  # llama.cpp takes the whole context of each at once


class LlamaCppModel:
    """An open model: weights mapped, vocabulary and metadata readable; no context yet."""

    def __init__(self, path: Path):
        self.path, self.api = path, bindings()
        _check_file(path)
        params = self.api.llama_model_default_params()
        if hasattr(params, "use_extra_bufts"):
            # Weights repacked for AMX crash llama-cpp-python 0.3.x in its matrix product (seen with 0.3.36).
            params.use_extra_bufts = not any(name.startswith("amx") for name in host_features())
        forget_errors()
        self.handle = self.api.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle:
            raise UnsupportedModelError(f"{path.name} (llama.cpp: {last_error()})")
        self.vocab = self.api.llama_model_get_vocab(self.handle)

    @property
    def vocab_size(self) -> int:
        return int(self.api.llama_vocab_n_tokens(self.vocab))

    @property
    def train_context(self) -> int:
        return int(self.api.llama_model_n_ctx_train(self.handle))

    @property
    def kv_bytes_per_token(self) -> int:
        """Of llama.cpp's half-precision KV."""
        api, heads = self.api, max(1, self.api.llama_model_n_head(self.handle))
        width = api.llama_model_n_embd(self.handle) // heads * max(1, api.llama_model_n_head_kv(self.handle))
        return int(api.llama_model_n_layer(self.handle) * width * 2 * 2)

    def metadata(self, key: str) -> str | None:
        """A value of the file's metadata as text."""
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            needed = self.api.llama_model_meta_val_str(self.handle, key.encode(), buffer, size)
            if needed < 0:
                return None
            if needed < size:
                return buffer.value.decode("utf-8", "replace")
            size = needed + 1

    def close(self) -> None:
        if self.handle:
            self.api.llama_model_free(self.handle)
            self.handle = None


@dataclass
class _Slot:
    """One of llama.cpp's sequences: the tokens whose KV it holds."""

    number: int
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    used: int = 0  # step of the last use

    def shared(self, history: np.ndarray) -> int:
        """Leading tokens that it has in common with `history`."""
        count = min(len(self.tokens), len(history))
        differs = np.flatnonzero(self.tokens[:count] != history[:count])
        return int(differs[0]) if len(differs) else count


@dataclass
class _Row:
    token: int
    position: int
    slot: int
    output: int  # row of the result, -1 where no logits are wanted


class LlamaCppDevice:
    """See `devices.base.Device`. `slots` sequences of `context` tokens. llama.cpp computes the rows of a step as it
    likes: a row's last digits may depend on the others, so a seed's text is only sure to repeat in like company."""

    uniform = True  # the pages hold token ids, which are the same however they came about

    def __init__(self, model: LlamaCppModel, *, context: int, slots: int = MAX_SLOTS, threads: int | None = None):
        api = model.api
        self.model, self.context, self.max_rows, self.vocab_size = model, context, MAX_ROWS, model.vocab_size
        self.kv_layout = HISTORY_LAYOUT
        params = api.llama_context_default_params()
        params.n_ctx, params.n_seq_max = context * slots, slots
        params.n_batch = params.n_ubatch = MAX_ROWS
        params.n_threads = params.n_threads_batch = threads or os.cpu_count() or 1
        if hasattr(params, "kv_unified"):
            params.kv_unified = False
        forget_errors()
        self._context = api.llama_init_from_model(model.handle, params)
        if not self._context:
            raise DeviceError(f"llama.cpp refused a context of {slots} x {context} tokens: {last_error()}. Open the "
                              f"model with a smaller context.")
        self._memory = api.llama_get_memory(self._context)
        self._batch = api.llama_batch_init(MAX_ROWS, 0, 1)
        self._slots = [_Slot(number) for number in range(slots)]
        self._step = 0

    def run(self, step: Step) -> StepResult:
        """Logits of a step. Raises `DeviceError` for hidden states, which llama.cpp does not hand out per row here."""
        if any(part.hidden for part in step.slices):
            raise DeviceError('embeddings are not available with device="llama.cpp", only with device="cpu"')
        self._step += 1
        logits = np.empty((step.logit_rows, self.vocab_size), np.float32)
        histories = [_history(part) for part in step.slices]
        rows: list[_Row] = []
        output = 0
        try:
            for part, history, slot in zip(step.slices, histories, self._assign(histories)):
                wanted = {"all": len(part.token_ids), "last": 1, "none": 0}[part.logits]
                start = self._rewind(slot, history, min(slot.shared(history), len(history) - max(1, wanted)))
                first_wanted = len(history) - wanted
                for position in range(start, len(history)):
                    at = output + position - first_wanted if position >= first_wanted else -1
                    rows.append(_Row(int(history[position]), position, slot.number, at))
                output += wanted
                slot.tokens, slot.used = history, self._step
            for first in range(0, len(rows), MAX_ROWS):
                self._decode(rows[first:first + MAX_ROWS], logits)
        except BaseException:
            self._forget()
            raise
        return StepResult(logits)

    def close(self) -> None:
        if self._context:
            self.model.api.llama_batch_free(self._batch)
            self.model.api.llama_free(self._context)
            self._context = None
            self.model.close()

    def _assign(self, histories: list[np.ndarray]) -> list[_Slot]:
        """A slot of its own for every history, the one that has most of it; among equals the longest unused."""
        if len(histories) > len(self._slots):
            raise DeviceError(f"a step of {len(histories)} sequences, llama.cpp was opened for {len(self._slots)}")
        pairs = sorted(((-slot.shared(history), slot.used, slot.number, index)
                        for index, history in enumerate(histories) for slot in self._slots))
        chosen: dict[int, _Slot] = {}
        taken: set[int] = set()
        for _, _, number, index in pairs:
            if index not in chosen and number not in taken:
                chosen[index] = self._slots[number]
                taken.add(number)
        return [chosen[index] for index in range(len(histories))]

    def _rewind(self, slot: _Slot, history: np.ndarray, keep: int) -> int:
        """Cut a slot back to `keep` tokens; returns how many are left (0 where the model can only start anew)."""
        if keep == len(slot.tokens):
            return keep
        if keep > 0 and self.model.api.llama_memory_seq_rm(self._memory, slot.number, keep, -1):
            return keep
        self.model.api.llama_memory_seq_rm(self._memory, slot.number, -1, -1)
        return 0

    def _decode(self, rows: list[_Row], logits: np.ndarray) -> None:
        batch, api = self._batch, self.model.api
        batch.n_tokens = len(rows)
        for i, row in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = row.token, row.position, 1
            batch.seq_id[i][0], batch.logits[i] = row.slot, row.output >= 0
        forget_errors()
        code = api.llama_decode(self._context, batch)
        if code != 0:
            raise DeviceError(f"llama.cpp failed in a step of {len(rows)} rows (code {code}): {last_error()}")
        for i, row in enumerate(rows):
            if row.output >= 0:
                logits[row.output] = np.ctypeslib.as_array(
                    api.llama_get_logits_ith(self._context, i), shape=(self.vocab_size,))

    def _forget(self) -> None:
        self.model.api.llama_memory_clear(self._memory, True)
        for slot in self._slots:
            slot.tokens = np.empty(0, np.int32)


def _history(part: SequenceSlice) -> np.ndarray:
    """Write the slice's tokens into its pages and read the whole sequence back, int32 [position + n]."""
    end = part.position + len(part.token_ids)
    pages = [np.ctypeslib.as_array((ctypes.c_int32 * PAGE_TOKENS).from_address(int(address)))
             for address in part.pages[:-(-end // PAGE_TOKENS)]]
    for offset, token in enumerate(part.token_ids):
        page, index = divmod(part.position + offset, PAGE_TOKENS)
        pages[page][index] = token
    return np.concatenate(pages)[:end]


def _check_file(path: Path) -> None:
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelNotFoundError(path, error.strerror or "cannot be opened") from error
    if magic != b"GGUF":
        raise CorruptModelError(path, 0, f"it begins with {magic!r}, not with b'GGUF'")
