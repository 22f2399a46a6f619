"""Greedy replies from llama.cpp, as a second opinion on an exported file. Needs llama-cpp-python."""
from __future__ import annotations

import ctypes
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from edge_runtime.errors import CorruptModelError
from edge_runtime.models.llama_cpp_bindings import bindings


def llama_cpp_generator(path: pathlib.Path, threads: int = 1,
                        context: int = 2048) -> Callable[[Sequence[str], int], list[str]]:
    """A callable from prompts (special tokens by name) and max_tokens to greedy replies."""
    lc = bindings("Running a file in llama.cpp")
    model_params = lc.llama_model_default_params()
    # The weights repacked for AMX crash llama-cpp-python 0.3 on processors that have it.
    model_params.use_extra_bufts = False
    model = lc.llama_model_load_from_file(str(path).encode(), model_params)
    if not model:
        raise CorruptModelError(path, 0, "llama.cpp does not load it")
    params = lc.llama_context_default_params()
    params.n_ctx = params.n_batch = context
    params.n_threads = params.n_threads_batch = threads
    handle = lc.llama_init_from_model(model, params)
    vocabulary = lc.llama_model_get_vocab(model)
    size = lc.llama_vocab_n_tokens(vocabulary)

    def tokenize(text: str) -> list[int]:
        raw = text.encode()
        buffer = (ctypes.c_int32 * (len(raw) + 8))()
        count = lc.llama_tokenize(vocabulary, raw, len(raw), buffer, len(buffer), False, True)
        return list(buffer[:count])

    def piece(token: int) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        length = lc.llama_token_to_piece(vocabulary, token, buffer, 256, 0, False)
        return buffer.raw[:length]

    def decode(ids: Sequence[int]) -> None:
        array = (ctypes.c_int32 * len(ids))(*ids)
        if lc.llama_decode(handle, lc.llama_batch_get_one(array, len(ids))):
            raise RuntimeError("llama_decode failed")

    memory = lc.llama_get_memory(handle)
    held: list[int] = []

    def reply(prompt: str, max_tokens: int) -> str:
        ids, said = tokenize(prompt), b""
        same = 0
        while same < min(len(held), len(ids) - 1) and held[same] == ids[same]:
            same += 1
        lc.llama_memory_seq_rm(memory, 0, same, -1)
        held[same:] = ids[same:]
        ids = ids[same:]
        for _ in range(max_tokens):
            decode(ids)
            logits = np.ctypeslib.as_array(lc.llama_get_logits_ith(handle, -1), shape=(size,))
            token = int(logits.argmax())
            if lc.llama_vocab_is_eog(vocabulary, token):
                break
            said += piece(token)
            ids = [token]
            held.append(token)
        del held[lc.llama_memory_seq_pos_max(memory, 0) + 1 :]  # a last token that was never decoded
        return said.decode("utf-8", "replace")

    def generate(prompts: Sequence[str], max_tokens: int) -> list[str]:
        return [reply(prompt, max_tokens) for prompt in prompts]

    return generate
