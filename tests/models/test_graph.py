"""The graph builder: which graphs there are, what they share, and that they are well-formed."""
from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx")

import onnx

from edge_runtime.models.config import config_from_gguf
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.graph import nodes
from edge_runtime.models.graph.decoder import DecoderGraphs
from edge_runtime.models.graph.matrices import convert, stack
from tests.gguf_factory import write_model

CASES = {
    "llama": dict(layers=3),
    "qwen2": dict(architecture="qwen2", types={"default": "Q4_0", "v": "Q8_0"}),
    "qwen3": dict(architecture="qwen3", types={"default": "Q4_K", "v": "Q6_K"}, width=256, ffn=256, tied=False),
    "floats": dict(types="F16"),
}


@pytest.fixture(params=CASES)
def graphs(request, tmp_path):
    with GGUFFile(write_model(tmp_path / "m.gguf", **CASES[request.param])) as file:
        yield DecoderGraphs(file, config_from_gguf(file))


def test_segments_together_hold_the_weights_of_the_whole_once(graphs):
    layers = graphs.config.layers
    segments = [*(graphs.segment(i) for i in range(layers)), graphs.head()]
    of_segments = [name for segment in segments for name in segment.weights]
    assert len(of_segments) == len(set(of_segments))
    assert set(of_segments) == set(graphs.whole().weights) == set(graphs.shapes()) | set(graphs.vectors())
    assert graphs.attention().weights == graphs.attention_of_basics().weights == ()


def test_bytes_are_those_of_the_arrays(graphs):
    matrices = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in graphs.shapes().values())
    vectors = sum(array.nbytes for name, array in graphs.vectors().items() if "_norm.weight+" not in name)
    assert graphs.nbytes == matrices + vectors


def test_protos_name_every_tensor_once_and_hold_no_weights(graphs):
    models = [graphs.whole(), graphs.attention(), graphs.attention_of_basics(), graphs.head(1),
              *(graphs.segment(i) for i in range(graphs.config.layers))]
    for model in models:
        proto = onnx.load_from_string(model.proto)
        graph = proto.graph
        made = [t.name for t in graph.initializer] + [i.name for i in graph.input]
        made += [name for node in graph.node for name in node.output if name]
        assert len(made) == len(set(made)), model.name
        assert {name for node in graph.node for name in node.input if name} <= set(made)
        assert {o.name for o in graph.output} <= set(made)
        assert len({node.name for node in graph.node}) == len(graph.node)
        outside = {t.name for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
        assert outside == set(model.weights)
        assert len(model.proto) < 64_000
        assert all(node.domain in ("", nodes.CONTRIB) for node in graph.node)


def test_the_first_and_the_last_graph_have_no_attention_and_cuts_meet(graphs):
    for i in range(graphs.config.layers):
        segment = graphs.segment(i)
        kinds = [node.op_type for node in onnx.load_from_string(segment.proto).graph.node]
        assert "GroupQueryAttention" not in kinds and "RotaryEmbedding" in kinds
        assert ("attended" in [p.name for p in segment.inputs]) == (i > 0)
    whole = onnx.load_from_string(graphs.whole().proto).graph.node
    assert [n.op_type for n in whole].count("GroupQueryAttention") == graphs.config.layers


def test_q4_0_keeps_the_files_own_codes(tmp_path):
    with GGUFFile(write_model(tmp_path / "m.gguf", types="Q4_0")) as file:
        info = file.tensors["blk.0.attn_q.weight"]
        raw = file.data(info.name).reshape(-1, 18)
        codes, scales, offsets = convert(file.data(info.name).reshape(info.shape[0], -1), "Q4_0", info.shape[1])
        unpacked = np.stack([codes & 15, codes >> 4], axis=-1).reshape(-1, 32)
        assert np.array_equal(unpacked, np.concatenate([raw[:, 2:] & 15, raw[:, 2:] >> 4], axis=1))
        assert np.array_equal(scales.reshape(-1), raw[:, :2].copy().view(np.float16).astype(np.float32).reshape(-1))
        assert offsets is None


def test_neighbours_of_one_layout_are_stacked(tmp_path):
    with GGUFFile(write_model(tmp_path / "m.gguf", types={"default": "Q4_0", "v": "Q8_0"})) as file:
        infos = [file.tensors[f"blk.0.attn_{part}.weight"] for part in "qkv"]
        assert [len(matrix.names) for matrix in stack(infos)] == [2, 1]
        assert [len(matrix.names) for matrix in stack(infos[:2])] == [2]
