"""A device without a model: its logits are a function of the whole token history, which it keeps in the KV pages.

Any error in sharing, copying, forking or truncating pages changes the history that it reads back, and so the text.
"""
from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy as np

from edge_runtime.bpe import CHAR_TO_BYTE
from edge_runtime.devices.base import PAGE_TOKENS, KVLayout, SequenceSlice, Step, StepResult
from edge_runtime.tokenizer import Tokenizer

VOCAB, BOS, EOS = 260, 256, 257
WIDTH = 8


class FakeDevice:
    """fail: called with the step number before each step, may raise. poison: called with a token history, True makes
    its logits NaN. end_every: one history in so many draws EOS under greedy sampling; 0 never. delay: seconds a step
    takes. sizes: rows per slice of the steps that ran."""

    vocab_size = VOCAB

    def __init__(self, *, max_rows: int = 512, end_every: int = 0, delay: float = 0.0,
                 fail: Callable[[int], None] | None = None, poison: Callable[[np.ndarray], bool] | None = None):
        self.max_rows, self.end_every, self.delay, self.fail, self.poison = max_rows, end_every, delay, fail, poison
        self.kv_layout = KVLayout(layers=2, kv_heads=2, head_size=16)
        self.sizes: list[list[int]] = []
        self.started = 0
        self.closed = False
        self.gate: threading.Event | None = None  # when set, steps wait for it

    def run(self, step: Step) -> StepResult:
        assert not self.closed
        assert 0 < step.rows <= self.max_rows
        if self.gate is not None:
            self.gate.wait()
        if self.fail is not None:
            self.started += 1
            self.fail(self.started - 1)
        if self.delay:
            time.sleep(self.delay)
        self.sizes.append([len(s.token_ids) for s in step.slices])
        logits, hidden = [], []
        for part in step.slices:
            history = self._history(part)
            rows = {"last": [len(history)], "none": []}.get(part.logits)
            for end in rows if rows is not None else range(part.position + 1, len(history) + 1):
                logits.append(self.logits(history[:end]))
            if part.hidden:
                hidden += [self.hidden(history[:end]) for end in range(part.position + 1, len(history) + 1)]
        return StepResult(np.array(logits, np.float32).reshape(-1, VOCAB),
                          np.array(hidden, np.float32).reshape(-1, WIDTH) if hidden else None)

    def logits(self, history: np.ndarray) -> np.ndarray:
        if self.poison is not None and self.poison(history):
            return np.full(VOCAB, np.nan, np.float32)
        seed = _seed(history)
        out = np.random.default_rng(seed).standard_normal(VOCAB).astype(np.float32)
        out[97:123] += 4  # small letters, so that greedy text is readable
        out[32] += 4
        out[EOS] = 100 if self.end_every and seed % self.end_every == 0 else -30
        out[EOS + 1:] = -30
        return out

    @staticmethod
    def hidden(history: np.ndarray) -> np.ndarray:
        return np.random.default_rng(_seed(history)).standard_normal(WIDTH).astype(np.float32)

    def close(self) -> None:
        self.closed = True

    def _history(self, part: SequenceSlice) -> np.ndarray:
        """Write the slice's tokens into the pages, then read the whole sequence back from them, twice."""
        end = part.position + len(part.token_ids)
        pages = -(-end // PAGE_TOKENS)
        assert len(part.token_ids) > 0 and len(part.pages) >= pages and part.token_ids.dtype == np.int32
        assert (part.pages[:pages] % 64 == 0).all() and (part.pages[:pages] > 0).all()
        copies = []
        for offset in (0, self.kv_layout.page_bytes - 4 * PAGE_TOKENS):
            views = [_ints(int(address) + offset) for address in part.pages[:pages]]
            for i, token in enumerate(part.token_ids):
                page, slot = divmod(part.position + i, PAGE_TOKENS)
                views[page][slot] = token
            copies.append(np.concatenate(views)[:end])
        assert (copies[0] == copies[1]).all(), "a page was copied in part"
        return copies[0]


def byte_tokenizer(add_bos: bool = True) -> Tokenizer:
    """Token b is byte b; then BOS, EOS and two more control tokens."""
    char = {byte: text for text, byte in CHAR_TO_BYTE.items()}
    return Tokenizer.from_metadata({
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "default", "tokenizer.ggml.merges": [],
        "tokenizer.ggml.tokens": [*(char[byte] for byte in range(256)), "<s>", "</s>", "<x>", "<y>"],
        "tokenizer.ggml.token_type": [1] * 256 + [3] * 4,
        "tokenizer.ggml.bos_token_id": BOS, "tokenizer.ggml.eos_token_id": EOS,
        "tokenizer.ggml.add_bos_token": add_bos})


def greedy(prompt: Sequence[int], count: int, device: FakeDevice | None = None) -> list[int]:
    """What the device continues a prompt with, without any engine. EOS ends it and is not part of it."""
    device = device or FakeDevice()
    history = list(prompt)
    for _ in range(count):
        token = int(device.logits(np.array(history, np.int32)).argmax())
        if token == EOS:
            break
        history.append(token)
    return history[len(prompt):]


def _seed(history: np.ndarray) -> int:
    return int.from_bytes(blake2b(np.ascontiguousarray(history, "<i4").tobytes(), digest_size=8).digest(), "little")


def _ints(address: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_int32 * PAGE_TOKENS).from_address(address))
