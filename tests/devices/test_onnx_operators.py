"""Every operator of the graphs against NumPy, to 1e-5 of the values' size."""
from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from edge_runtime.devices.onnx import PROVIDERS
from edge_runtime.devices.onnx.arrays import HostArray
from edge_runtime.devices.onnx.attention import attention_oracle
from edge_runtime.devices.onnx.memory import DeviceMemory, HostMemory
from edge_runtime.devices.onnx.providers import runtime
from edge_runtime.devices.onnx.sessions import Session, SessionSettings
from edge_runtime.models.config import config_from_gguf
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.graph.decoder import DecoderGraphs
from edge_runtime.models.graph.matrices import LAYOUTS, restore, stack
from edge_runtime.models.graph.nodes import CONTRIB, FLOAT, INT64, Graph
from edge_runtime.models.reference import rms_norm
from tests.gguf_factory import write_model

ERROR = 1e-5
BITS4 = ("Q4_0", "Q4_1", "Q4_K")


class OperatorTests:
    """Subclass it with the name of a provider; attention: it has GroupQueryAttention."""

    provider = "cpu"
    attention = True

    def run(self, graph: Graph, inputs: dict, outputs: dict, weights: dict | None = None) -> list[np.ndarray]:
        values = {k: runtime().OrtValue.ortvalue_from_numpy(v) for k, v in (weights or {}).items()}
        session = Session(graph.model(), SessionSettings(PROVIDERS[self.provider]), values)
        return list(session.run(inputs, outputs, to_host=tuple(outputs)).values())

    def check(self, got: np.ndarray, want: np.ndarray) -> None:
        assert got.shape == want.shape
        assert np.abs(got - want).max() <= ERROR * max(1.0, float(np.abs(want).max()))

    @pytest.mark.parametrize("type", LAYOUTS)
    def test_matrix_products_are_those_of_the_file(self, type, tmp_path):
        rng = np.random.default_rng(1)
        with GGUFFile(write_model(tmp_path / "m.gguf", types=type, width=256, ffn=512, layers=1, scale=3.0)) as file:
            matrix = stack([file.tensors["blk.0.attn_q.weight"], file.tensors["blk.0.attn_k.weight"]])[0]
            arrays = {part: np.empty(shape, dtype) for part, (shape, dtype) in matrix.parts().items()}
            matrix.fill(file, arrays)
            want = np.concatenate([file.floats(name) for name in matrix.names])
        for rows in (1, 2, 40):
            g = Graph("product")
            g.linear(g.input("x", FLOAT, "n", 256), [matrix], output=g.output("y", FLOAT, "n", matrix.outputs))
            x = rng.standard_normal((rows, 256)).astype(np.float32)
            weights = {f"{'+'.join(matrix.names)}.{part}": array for part, array in arrays.items()}
            self.check(self.run(g, {"x": x}, {"y": (rows, matrix.outputs)}, weights)[0], x @ want.T)

    def test_norms(self):
        rng = np.random.default_rng(2)
        x, added, weight = (rng.standard_normal(shape).astype(np.float32) for shape in ((9, 96), (9, 96), 96))
        g = Graph("norms")
        g.op("SimplifiedLayerNormalization", [g.input("x", FLOAT, "n", 96), g.constant("w", weight)],
             g.output("plain", FLOAT, "n", 96), axis=-1, epsilon=1e-6, stash_type=1)
        g.ops("SkipSimplifiedLayerNormalization", ["x", g.input("added", FLOAT, "n", 96), "w"],
              [g.output("normed", FLOAT, "n", 96), "", "", g.output("total", FLOAT, "n", 96)], CONTRIB, epsilon=1e-6)
        shapes = dict.fromkeys(("plain", "normed", "total"), (9, 96))
        plain, normed, total = self.run(g, {"x": x, "added": added}, shapes)
        self.check(plain, rms_norm(x, weight, 1e-6))
        self.check(total, x + added)
        self.check(normed, rms_norm(x + added, weight, 1e-6))

    @pytest.mark.parametrize("style", ["norm", "neox"])
    def test_rotary_embedding(self, style):
        rng = np.random.default_rng(3)
        heads, size, n = 3, 32, 7
        x, angles = rng.standard_normal((n, heads * size)).astype(np.float32), rng.random((n, size // 2)) * 100
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        g, width = Graph("rope"), heads * size
        flat = g.op("Reshape", [g.input("x", FLOAT, "n", width), g.constant("s", np.array([1, -1, width]))])
        tables = [g.input(name, FLOAT, "n", size // 2) for name in ("cos", "sin")]
        rotated = g.op("RotaryEmbedding", [flat, g.input("places", INT64, 1, "n"), *tables], domain=CONTRIB,
                       interleaved=int(style == "norm"))
        g.op("Reshape", [rotated, g.constant("r", np.array([-1, width]))], g.output("y", FLOAT, "n", width))
        got = self.run(g, {"x": x, "cos": cos, "sin": sin, "places": np.arange(n)[None]}, {"y": x.shape})[0]
        parts = x.reshape(n, heads, size)
        a, b = (parts[..., 0::2], parts[..., 1::2]) if style == "norm" else (parts[..., :16], parts[..., 16:])
        c, s = cos[:, None], sin[:, None]
        turned = [a * c - b * s, a * s + b * c]
        want = np.stack(turned, -1) if style == "norm" else np.concatenate(turned, -1)
        self.check(got, want.reshape(x.shape))

    @pytest.mark.parametrize("head_size", [16, 64, 80, 128])
    def test_attention_in_shared_buffers(self, head_size, tmp_path):
        """A prompt, a chunk after it, then decoded tokens of two sequences of different lengths in one call."""
        if not self.attention:
            pytest.skip("built from basic operators here")
        rng, settings = np.random.default_rng(4), SessionSettings(PROVIDERS[self.provider])
        path = write_model(tmp_path / "m.gguf", heads=4, kv_heads=2, head_size=head_size, layers=1)
        with GGUFFile(path) as file:
            graphs = DecoderGraphs(file, config_from_gguf(file))
        session = Session(graphs.attention(), settings, {})
        memory = HostMemory() if PROVIDERS[self.provider].memory == "cpu" else DeviceMemory(settings)
        data = rng.standard_normal((2, 30, graphs.qkv_width)).astype(np.float32)
        want = [attention_oracle(rows, 4, 2, head_size) for rows in data]
        batch = [memory.zeros((2, 2, 40, head_size)) for _ in range(2)]
        lengths = (29, 12)
        for i, length in enumerate(lengths):
            single = [memory.zeros((1, 2, 40, head_size)) for _ in range(2)]
            for a, b in ((0, 5), (5, length)):
                out = self.attend(session, memory, single, data[i:i + 1, a:b], [b])
                self.check(out[0], want[i][a:b])
            for source, target in zip(single, batch):
                memory.write(target, i, 0, memory.read(source, 0, 0, length))
        rows = np.stack([data[i, length] for i, length in enumerate(lengths)])[:, None]
        out = self.attend(session, memory, batch, rows, [length + 1 for length in lengths])
        for i, length in enumerate(lengths):
            self.check(out[i, 0], want[i][length])

    @staticmethod
    def attend(session, memory, buffers, qkv, ends) -> np.ndarray:
        ends = np.array(ends, np.int32)
        width = qkv.shape[-1] // 2  # 4 query heads, 2 kv heads
        keys, values = buffers
        new = session.run({"qkv": np.ascontiguousarray(qkv), "past_key": keys, "past_value": values,
                           "seqlens": ends - 1, "total": ends.max(keepdims=True)},
                          {"attended": (*qkv.shape[:2], width), "present_key": keys, "present_value": values},
                          to_host=("attended",))
        return new["attended"]


class TestCpuProvider(OperatorTests):
    @pytest.mark.parametrize("type", LAYOUTS)
    def test_the_layout_restores_the_weights(self, type, tmp_path):
        with GGUFFile(write_model(tmp_path / "m.gguf", types=type, width=256, ffn=512, layers=1)) as file:
            for matrix in DecoderGraphs(file, config_from_gguf(file)).matrices:
                arrays = {part: np.empty(shape, dtype) for part, (shape, dtype) in matrix.parts().items()}
                matrix.fill(file, arrays)
                want = np.concatenate([file.floats(name) for name in matrix.names])
                difference = np.abs(restore(matrix, arrays) - want).max()
                assert difference <= (1e-6 * np.abs(want).max() if matrix.layout.offsets else 0)

    def test_memory_copies_leave_neighbours_alone(self):
        memory, rng = HostMemory(), np.random.default_rng(5)
        buffer = memory.zeros((3, 2, 8, 4))
        part = rng.standard_normal((2, 3, 4)).astype(np.float32)
        memory.write(buffer, 1, 4, part)
        assert np.array_equal(memory.read(buffer, 1, 4, 7), part)
        assert isinstance(buffer, HostArray) and np.count_nonzero(buffer.array) == part.size
