"""llama.cpp under measurement, through llama-cpp-python's low-level functions: flash attention on, batches of 512."""
from __future__ import annotations

import time
from typing import Any

import numpy as np

from edge_runtime.apps.bench_worker import STEP_TOKENS
from edge_runtime.errors import MissingExtraError


class LlamaCppRunner:
    """See `bench_worker.Runner`. One context for one sequence; one more for each batch, closed after it."""

    def __init__(self) -> None:
        try:
            import llama_cpp
        except ImportError as error:
            raise MissingExtraError("llama-cpp-python", "llamacpp", "Comparing with llama.cpp") from error
        self.api = llama_cpp
        self.rng = np.random.default_rng(0)
        self.context: Any = None

    def load(self, path: str, threads: int, tokens: int, kv: str = "", extra_buffers: bool = True) -> dict[str, Any]:
        began = time.perf_counter()
        api = self.api
        params = api.llama_model_default_params()
        if not extra_buffers:
            params.use_extra_bufts = False
        self.model = api.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise RuntimeError("llama.cpp cannot load this file")
        self.threads = threads
        self.vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.buffer = api.llama_batch_init(STEP_TOKENS, 0, 1)
        self.tokens = tokens
        self.context = self._open(tokens, 1)
        self.filled = 0
        return {"seconds": time.perf_counter() - began, "version": api.__version__, "threads": threads}

    def prefill(self, tokens: int) -> float:
        self._forget(self.context, 0)
        began = time.perf_counter()
        self._fill(self.context, 0, 0, tokens)
        self._wait(self.context)
        self.filled = tokens
        return tokens / (time.perf_counter() - began)

    def decode(self, depth: int, tokens: int) -> float:
        self._forget(self.context, min(depth, self.filled))
        if self.filled < depth:
            self._fill(self.context, 0, self.filled, depth)
            self._wait(self.context)
        self.filled = depth
        return self._grow(self.context, 1, depth, tokens)

    def batch(self, sequences: int, depth: int, tokens: int) -> float:
        context = self._open((depth + tokens) * sequences, sequences)
        try:
            for sequence in range(sequences):
                self._fill(context, sequence, 0, depth)
            self._wait(context)
            return self._grow(context, sequences, depth, tokens)
        finally:
            self.api.llama_free(context)

    def logits(self, token_ids: list[int], out: str, as_prompt: bool = True) -> None:
        self._forget(self.context, 0)
        self.filled = 0
        rows = []
        groups = [list(range(len(token_ids)))] if as_prompt else [[i] for i in range(len(token_ids))]
        for group in groups:
            self._decode(self.context, [(i, 0, 1) for i in group], [token_ids[i] for i in group])
            for i in range(len(group)):
                row = self.api.llama_get_logits_ith(self.context, i)
                rows.append(np.ctypeslib.as_array(row, (self.vocab,)).copy())
        np.save(out, np.stack(rows))

    def kv_bytes(self) -> int:
        """As allocated for the context, fp16 K and V of every layer."""
        api, model = self.api, self.model
        width = api.llama_model_n_embd(model) // api.llama_model_n_head(model) * api.llama_model_n_head_kv(model)
        return int(2 * 2 * width * api.llama_model_n_layer(model) * api.llama_n_ctx(self.context))

    def _open(self, tokens: int, sequences: int) -> Any:
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = tokens, STEP_TOKENS, STEP_TOKENS
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = 1
        params.kv_unified = False
        context = self.api.llama_init_from_model(self.model, params)
        if not context:
            raise RuntimeError(f"llama.cpp refused a context of {tokens} tokens in {sequences} sequences")
        return context

    def _forget(self, context: Any, length: int) -> None:
        """Drop what sequence 0 holds from `length` on."""
        self.api.llama_memory_seq_rm(self.api.llama_get_memory(context), 0, length, -1)
        self.filled = min(self.filled, length)

    def _decode(self, context: Any, rows: list[tuple[int, int, int]], token_ids: list[int] | None = None) -> None:
        """rows: (position, sequence, logits wanted)."""
        ids = token_ids or self.rng.integers(min(300, self.vocab // 2), self.vocab, len(rows)).tolist()
        b = self.buffer
        b.n_tokens = len(rows)
        for i, (position, sequence, wanted) in enumerate(rows):
            b.token[i], b.pos[i], b.n_seq_id[i] = ids[i], position, 1
            b.seq_id[i][0], b.logits[i] = sequence, wanted
        if self.api.llama_decode(context, b):
            raise RuntimeError("llama_decode failed")

    def _fill(self, context: Any, sequence: int, first: int, end: int) -> None:
        for at in range(first, end, STEP_TOKENS):
            last = min(end, at + STEP_TOKENS)
            self._decode(context, [(p, sequence, p == end - 1) for p in range(at, last)])

    def _grow(self, context: Any, sequences: int, depth: int, tokens: int) -> float:
        began = time.perf_counter()
        for i in range(tokens):
            self._decode(context, [(depth + i, s, 1) for s in range(sequences)])
        self._wait(context)
        return tokens * sequences / (time.perf_counter() - began)

    def _wait(self, context: Any) -> None:
        self.api.llama_synchronize(context)
