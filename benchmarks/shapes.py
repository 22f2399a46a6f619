"""Random-weight GGUF files in the shapes of real models: speed, memory and parity need no download.

    python benchmarks/shapes.py llama1b Q4_0 out.gguf

Weights are blocks of quantized N(0, 1) numbers, drawn from a pool and scaled to N(0, 1 / inputs): activations stay in
range, greedy text is noise. Never a measure of quality.
"""
from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_runtime.models.gguf_writer import TensorSource, array_tensor, write_gguf
from edge_runtime.models.names import EMBEDDING, HEAD, OUTPUT_NORM, layer_names
from edge_runtime.quant.formats import BlockFormat
from edge_runtime.quant.mixtures import FileType, file_type, mixed_format
from edge_runtime.quant.quantize import quantize

POOL_WEIGHTS = 1 << 20
CHUNK_BLOCKS = 1 << 18
HALF_FIELDS = {"Q4_0": (0,), "Q8_0": (0,), "Q5_0": (0,), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2),
               "Q5_K": (0, 2), "Q6_K": (208,)}  # bytes of a block where its float16 scales stand


@dataclass(frozen=True)
class Shape:
    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    head_size: int
    tied: bool = True


SHAPES = {
    "tiny": Shape(4, 256, 8, 4, 768, 2048, 32),
    "odd": Shape(3, 320, 5, 1, 864, 1003, 64, False),
    "qwen05b": Shape(24, 896, 14, 2, 4864, 151936, 64),
    "llama1b": Shape(16, 2048, 32, 8, 8192, 128256, 64),
    "llama8b": Shape(32, 4096, 32, 8, 14336, 128256, 128, False),
}


class Pool:
    """Quantized blocks of N(0, 1) numbers, by format."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self._blocks: dict[str, np.ndarray] = {}

    def blocks(self, form: BlockFormat) -> np.ndarray:
        """uint8 [n, block_bytes]."""
        if form.name not in self._blocks:
            weights = self.rng.standard_normal((POOL_WEIGHTS // 256, 256), np.float32)
            self._blocks[form.name] = quantize(weights, form).reshape(-1, form.block_bytes)
        return self._blocks[form.name]

    def tensor(self, name: str, rows: int, inputs: int, form: BlockFormat, scale: float) -> TensorSource:
        """A matrix of such blocks, times `scale`."""
        blocks = self.blocks(form).copy()
        if form.is_float:
            raise ValueError(f"{form.name}: shapes are for quantized types")
        for at in HALF_FIELDS[form.name]:
            halves = blocks[:, at:at + 2].copy().view(np.float16).astype(np.float32) * scale
            blocks[:, at:at + 2] = halves.astype(np.float16).view(np.uint8)

        def chunks() -> Iterator[np.ndarray]:
            left = rows * inputs // form.block_size
            while left:
                count = min(left, CHUNK_BLOCKS)
                yield blocks[self.rng.integers(0, len(blocks), count)]
                left -= count

        return TensorSource(name, (rows, inputs), form, chunks)


def write_shape(shape: Shape, type_name: str, path: str | Path, seed: int = 0, context: int = 32768,
                idle_from: int | None = None) -> Path:
    """A model of that shape, its matrices in the types that a file of `type_name` has. idle_from: layers from this one
    on add nothing (o and down are zero), at full cost: an exit there is always right."""
    kind, pool, s = file_type(type_name), Pool(seed), shape
    norm = lambda: (1 + 0.1 * pool.rng.standard_normal(s.width)).astype(np.float32)

    def matrix(name: str, rows: int, inputs: int, layer: int, scale: float | None = None) -> TensorSource:
        is_head = name == (EMBEDDING if s.tied else HEAD)
        form = mixed_format(kind, name, layer, s.layers, inputs, is_head)
        return pool.tensor(name, rows, inputs, form, inputs ** -0.5 if scale is None else scale)

    tensors = [matrix(EMBEDDING, s.vocab, s.width, -1, 0.02), array_tensor(OUTPUT_NORM, norm())]
    if not s.tied:
        tensors.append(matrix(HEAD, s.vocab, s.width, -1))
    for i in range(s.layers):
        n, idle = layer_names(i), 0.0 if idle_from is not None and i >= idle_from else None
        tensors += [
            array_tensor(n.attn_norm, norm()), array_tensor(n.ffn_norm, norm()),
            matrix(n.q, s.heads * s.head_size, s.width, i), matrix(n.k, s.kv_heads * s.head_size, s.width, i),
            matrix(n.v, s.kv_heads * s.head_size, s.width, i), matrix(n.o, s.width, s.heads * s.head_size, i, idle),
            matrix(n.gate, s.ffn, s.width, i), matrix(n.up, s.ffn, s.width, i),
            matrix(n.down, s.width, s.ffn, i, idle)]
    return write_gguf(path, _metadata(s, kind, context), tensors)


def _metadata(s: Shape, kind: FileType, context: int) -> dict:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"t{i}" for i in range(s.vocab - len(tokens))]
    return {
        "general.architecture": "llama", "general.name": "random weights", "general.file_type": kind.number,
        "general.quantization_version": 2, "llama.context_length": context, "llama.embedding_length": s.width,
        "llama.block_count": s.layers, "llama.feed_forward_length": s.ffn, "llama.attention.head_count": s.heads,
        "llama.attention.head_count_kv": s.kv_heads, "llama.attention.key_length": s.head_size,
        "llama.attention.value_length": s.head_size, "llama.rope.dimension_count": s.head_size,
        "llama.rope.freq_base": 500000.0, "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": s.vocab, "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array([0.0] * 259 + [-float(i) for i in range(s.vocab - 259)], np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3] + [6] * 256 + [1] * (s.vocab - 259), np.int32),
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
    }


def cached(shape: str, type_name: str, folder: Path, idle_from: int | None = None) -> Path:
    """The file of that shape and type in `folder`, written where it is not there yet."""
    path = folder / f"{shape}-{type_name.lower()}{'' if idle_from is None else f'-idle{idle_from}'}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_shape(SHAPES[shape], type_name, path, idle_from=idle_from)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("type")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    print(write_shape(SHAPES[a.shape], a.type, a.out, a.seed))


if __name__ == "__main__":
    main()
