"""llama.cpp as a yardstick: logits of a token sequence, and its quantizers, through llama-cpp-python's C bindings."""
from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from edge_runtime.models.llama_cpp_bindings import bindings
from edge_runtime.quant.formats import block_format

llama_cpp = bindings()
GGML_F32 = 0


@contextlib.contextmanager
def llama_cpp_context(path: str | Path, tokens: int) -> Iterator[tuple[ctypes.c_void_p, int]]:
    """A one-threaded context with a float32 KV cache, and the size of the vocabulary."""
    model_params = llama_cpp.llama_model_default_params()
    # The weights repacked for AMX crash llama-cpp-python 0.3 on processors that have it.
    model_params.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
    assert model, f"llama.cpp does not load {path}"
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = max(64, tokens)
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = GGML_F32
    params.flash_attn_type = 0
    context = llama_cpp.llama_init_from_model(model, params)
    try:
        yield context, llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)


def llama_cpp_logits(path: str | Path, token_ids: Sequence[int]) -> np.ndarray:
    """float32 [T, V]."""
    count = len(token_ids)
    with llama_cpp_context(path, count) as (context, vocabulary):
        batch = llama_cpp.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for i, token in enumerate(token_ids):
            batch.token[i], batch.pos[i], batch.logits[i] = int(token), i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert llama_cpp.llama_decode(context, batch) == 0
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(count, vocabulary)).copy()
        llama_cpp.llama_batch_free(batch)
    return logits


def llama_cpp_quantize_file(source: Path, target: Path, file_type: int) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = file_type, 1
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    assert code == 0


def ggml_quantize(weights: np.ndarray, name: str, importance: np.ndarray | None = None) -> np.ndarray:
    """float32 [rows, inputs] to uint8 [rows, row_bytes], by ggml's own quantizer. importance: float32 [inputs]."""
    format = block_format(name)
    weights = np.ascontiguousarray(weights, np.float32)
    out = np.empty((weights.shape[0], format.row_bytes(weights.shape[1])), np.uint8)
    chunk = llama_cpp.llama_cpp._lib.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
    matrix = None if importance is None else np.ascontiguousarray(importance, np.float32)
    written = chunk(format.ggml_type, weights.ctypes.data, out.ctypes.data, 0, *weights.shape,
                    None if matrix is None else matrix.ctypes.data)  # fmt: skip
    assert written == out.nbytes
    return out
