"""A decoder as ONNX graphs: the whole model, or cut at attention.

Segment 0 is norm + QKV(0); segment i is O(i-1) + residual + norm + MLP(i-1) + norm + QKV(i); the head after `layers`
layers is O + MLP(layers-1) + final norm + head. The token embedding is looked up on the host, straight from the mapped
file (a row of a few KB a token), so that the table takes no memory of the device.

Rows are flat: x float32 [n, W] is the residual stream of n rows, whatever sequences they belong to; qkv float32
[n, (H + 2K) * D] holds queries and keys after QK norm and RoPE, and values: what attention and the KV want. cos and
sin float32 [n, D / 2] are those of the rows' positions, computed by the host, so that any scaling of RoPE is data;
places int64 [1, n] counts 0, 1 .. n - 1.

The attention is GroupQueryAttention over a KV buffer float32 [B, K, C, D] per layer, with past and present in the same
memory: it appends the rows' keys and values to those of their sequence and attends over all. seqlens int32 [B] holds
each sequence's tokens after the step minus one, total int32 [1] the largest number of tokens after it.
Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""
from __future__ import annotations

from functools import cached_property

import numpy as np

from edge_runtime.models.config import ModelConfig
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.graph.matrices import Matrix, stack
from edge_runtime.models.graph.nodes import CONTRIB, FLOAT, INT32, INT64, Graph, GraphModel, weights_name
from edge_runtime.models.names import EMBEDDING, HEAD, OUTPUT_NORM, layer_names


class DecoderGraphs:
    """The graphs of a model, and the arrays that they share.

    accuracy_level: of MatMulNBits. 1 computes in float32, 4 rounds activations to int8 (faster where a provider has
    integer units; the CPU provider's error is then about that of 8-bit activations per block).
    half_kv: keys and values are rounded to half precision (and stay float32), so that KV kept elsewhere in halves holds
    the same numbers. half_casts: the provider has the type; else float32 arithmetic rounds.
    """

    def __init__(self, file: GGUFFile, config: ModelConfig, accuracy_level: int = 1, half_kv: bool = False,
                 half_casts: bool = True):
        self.file, self.config, self.accuracy_level = file, config, accuracy_level
        self.half_kv, self.half_casts = half_kv, half_casts
        self._names = [layer_names(i) for i in range(config.layers)]
        infos = lambda *names: stack([file.tensors[name] for name in names])
        self._qkv = [infos(n.q, n.k, n.v) for n in self._names]
        self._o = [infos(n.o) for n in self._names]
        self._gate_up = [(infos(n.gate), infos(n.up)) for n in self._names]
        self._down = [infos(n.down) for n in self._names]
        self._head = infos(EMBEDDING if config.tied_head else HEAD)

    @property
    def qkv_width(self) -> int:
        return self.config.q_width + 2 * self.config.kv_width

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """Every matrix, in the order of use."""
        found: list[Matrix] = []
        for qkv, o, (gate, up), down in zip(self._qkv, self._o, self._gate_up, self._down):
            found += [*qkv, *o, *gate, *up, *down]
        return (*found, *self._head)

    @property
    def nbytes(self) -> int:
        """Memory of all weights, in the layout of the graphs."""
        c = self.config
        vectors = c.layers * (2 * c.width + (self.qkv_width if c.qkv_bias else 0)) + c.width
        return sum(matrix.nbytes for matrix in self.matrices) + 4 * vectors

    def vectors(self) -> dict[str, np.ndarray]:
        """Norms and biases, float32, by the names of the graphs' initializers."""
        c, file = self.config, self.file
        arrays = {OUTPUT_NORM: file.floats(OUTPUT_NORM)}
        for n in self._names:
            arrays |= {n.attn_norm: file.floats(n.attn_norm), n.ffn_norm: file.floats(n.ffn_norm)}
            if c.qkv_bias:
                arrays[n.q_bias + "+"] = np.concatenate([file.floats(b) for b in (n.q_bias, n.k_bias, n.v_bias)])
            if c.qk_norm:
                arrays[n.q_norm + "+"] = np.concatenate([np.tile(file.floats(n.q_norm), (c.heads, 1)),
                                                         np.tile(file.floats(n.k_norm), (c.kv_heads, 1))])
        return arrays

    def shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and type of every matrix's arrays, by the names of the graphs' initializers."""
        return {f"{weights_name(matrix)}.{part}": spec for matrix in self.matrices
                for part, spec in matrix.parts().items()}

    def segment(self, index: int) -> GraphModel:
        """Segment `index` of 0 to layers - 1: inputs x, attended (from 1 on), cos, sin, places; outputs x_out (from 1
        on), qkv. attended: float32 [n, H * D], the attention of layer index - 1."""
        g = self._graph(f"segment{index}")
        g.input("x", FLOAT, "n", self.config.width)
        if index:
            g.input("attended", FLOAT, "n", self.config.q_width)
        self._rope_inputs(g)
        if index:
            _, normed = self._layer_end(g, "x", "attended", index - 1, "x_out")
            g.output("x_out", FLOAT, "n", self.config.width)
        else:
            normed = self._first_norm(g, "x")
        self._qkv_of(g, normed, index, "qkv")
        g.output("qkv", FLOAT, "n", self.qkv_width)
        return g.model()

    def head(self, layers: int | None = None) -> GraphModel:
        """After `layers` layers (all of them unless told): inputs x, attended, rows int64 [m] (those that are wanted),
        logit_rows int64 [j] (which of these want logits); outputs hidden [m, W] after the final norm, logits [j, V]."""
        layers = self.config.layers if layers is None else layers
        g = self._graph(f"head{layers}")
        g.input("x", FLOAT, "n", self.config.width)
        g.input("attended", FLOAT, "n", self.config.q_width)
        self._head_of(g, "x", "attended", layers)
        return g.model()

    def attention(self) -> GraphModel:
        """One layer's attention, the same for all: inputs qkv [B, S, (H + 2K) * D], past_key, past_value, seqlens,
        total; outputs attended [B, S, H * D], present_key, present_value."""
        g = self._graph("attention")
        g.input("qkv", FLOAT, "B", "S", self.qkv_width)
        self._kv_edges(g, "")
        self._length_inputs(g)
        self._attend(g, "qkv", "", "attended")
        g.output("attended", FLOAT, "B", "S", self.config.q_width)
        return g.model()

    def attention_of_basics(self) -> GraphModel:
        """One layer's attention of one sequence in basic operators, which every provider has, and with its log-sum-exp:
        inputs queries [n, H * D], key and value [1, K, C, D], mask [n * G, C] (added to the scores); outputs attended
        [n, H * D], lse [n, H]."""
        c = self.config
        g = self._graph("attention of basics")
        queries = g.input("queries", FLOAT, "n", c.q_width)
        key, value = (g.input(name, FLOAT, 1, c.kv_heads, "C", c.head_size) for name in ("key", "value"))
        mask = g.input("mask", FLOAT, "n*G", "C")
        shape = lambda *sizes: g.constant("shape " + ",".join(map(str, sizes)), np.array(sizes))
        by_kv_head = lambda x: g.op("Reshape", [x, shape(c.kv_heads, -1, c.head_size)])
        q = g.op("Transpose", [g.op("Reshape", [queries, shape(-1, c.kv_heads, c.group, c.head_size)])],
                 perm=[1, 0, 2, 3])
        scale = g.constant("scale", np.float32(c.head_size**-0.5))
        scores = g.op("MatMul", [g.op("Mul", [by_kv_head(q), scale]),
                                 g.op("Transpose", [by_kv_head(key)], perm=[0, 2, 1])])
        scores = g.op("Add", [scores, mask])
        last = g.constant("last", np.array([-1]))
        largest = g.op("ReduceMax", [scores, last], keepdims=1)
        weights = g.op("Exp", [g.op("Sub", [scores, largest])])
        total = g.op("ReduceSum", [weights, last], keepdims=1)
        out = g.op("Div", [g.op("MatMul", [weights, by_kv_head(value)]), total])
        out = g.op("Reshape", [out, shape(c.kv_heads, -1, c.group, c.head_size)])
        out = g.op("Transpose", [out], perm=[1, 0, 2, 3])
        g.op("Reshape", [out, shape(-1, c.q_width)], g.output("attended", FLOAT, "n", c.q_width))
        lse = g.op("Reshape", [g.op("Add", [largest, g.op("Log", [total])]), shape(c.kv_heads, -1, c.group)])
        g.op("Reshape", [g.op("Transpose", [lse], perm=[1, 0, 2]), shape(-1, c.heads)],
             g.output("lse", FLOAT, "n", c.heads))
        return g.model()

    def attention_of_one_row(self, block: int) -> GraphModel:
        """The same for one query row and the CPU provider, whose matrix products stream what they read only in some
        shapes (32,768 tokens, 32 heads, 8 kv heads: 10 against 13 ms; GroupQueryAttention takes 15). Inputs
        queries [1, H * D]; key.i [C, D] and value.i [C / block, 1, block, D] of kv head i; mask [C]. Outputs attended
        [1, H * D], lse [1, H].

        Scores are keys times queries: the long matrix on the left is not copied. The output is summed by blocks whose
        values stay in the first cache level for all heads of the group: products of one row, which are not copied."""
        c, g = self.config, self._graph("attention of one row")
        queries, heads = g.input("queries", FLOAT, 1, c.q_width), range(c.kv_heads)
        keys = [g.input(f"key.{i}", FLOAT, "C", c.head_size) for i in heads]
        values = [g.input(f"value.{i}", FLOAT, "blocks", 1, block, c.head_size) for i in heads]
        mask = g.input("mask", FLOAT, "C")
        reshape = lambda x, *sizes: g.op("Reshape", [x, g.constant(f"shape {sizes}", np.array(sizes))])
        each = lambda x, name: g.ops("Split", [x], [f"{name}.{i}" for i in heads], axis=0, num_outputs=c.kv_heads)
        product = lambda xs, ys: g.op("Concat", [g.op("MatMul", [x, y]) for x, y in zip(xs, ys)], axis=0)
        axis = lambda n: g.constant(f"axis {n}", np.array([n]))
        scaled = g.op("Mul", [reshape(queries, c.kv_heads, c.group, c.head_size),
                              g.constant("scale", np.float32(c.head_size**-0.5))])
        scores = product(keys, each(g.op("Transpose", [scaled], perm=[0, 2, 1]), "q"))
        # The reshape keeps ONNX Runtime from moving the transposition behind the softmax, which is slow that way.
        scores = g.op("Add", [reshape(g.op("Transpose", [scores], perm=[0, 2, 1]), c.heads, -1), mask])
        largest = g.op("ReduceMax", [scores, axis(-1)], keepdims=1)
        weights = g.op("Exp", [g.op("Sub", [scores, largest])])
        total = g.op("ReduceSum", [weights, axis(-1)], keepdims=1)
        blocks = g.op("Transpose", [reshape(weights, c.kv_heads, c.group, -1, 1, block)], perm=[0, 2, 1, 3, 4])
        out = g.op("ReduceSum", [product(each(blocks, "weights"), values), axis(1)], keepdims=0)
        out = g.op("Div", [reshape(out, c.heads, c.head_size), total])
        g.op("Reshape", [out, g.constant("row", np.array([1, c.q_width]))], g.output("attended", FLOAT, 1, c.q_width))
        lse = g.op("Add", [largest, g.op("Log", [total])])
        g.op("Reshape", [lse, g.constant("row of heads", np.array([1, c.heads]))], g.output("lse", FLOAT, 1, c.heads))
        return g.model()

    def whole(self) -> GraphModel:
        """All in one: inputs x [B * S, W], cos, sin, places, shape int64 [3] = (B, S, (H + 2K) * D), seqlens, total,
        rows, logit_rows, past_key.i and past_value.i of every layer; outputs as `head`, and the present ones."""
        g = self._graph("whole")
        g.input("x", FLOAT, "n", self.config.width)
        self._rope_inputs(g)
        g.input("shape", INT64, 3)
        self._length_inputs(g)
        flat = g.constant("flat", np.array([-1, self.config.q_width]))
        x, normed = "x", self._first_norm(g, "x")
        attended = ""
        for i in range(self.config.layers):
            if i:
                x, normed = self._layer_end(g, x, attended, i - 1, f"x.{i}")
            self._kv_edges(g, f".{i}")
            qkv = g.op("Reshape", [self._qkv_of(g, normed, i, f"qkv.{i}"), "shape"])
            attended = g.op("Reshape", [self._attend(g, qkv, f".{i}", f"attended.{i}"), flat])
        self._head_of(g, x, attended, self.config.layers)
        return g.model()

    def _graph(self, name: str) -> Graph:
        return Graph(name, self.accuracy_level)

    def _rope_inputs(self, g: Graph) -> None:
        for name in ("cos", "sin"):
            g.input(name, FLOAT, "n", self.config.head_size // 2)
        g.input("places", INT64, 1, "n")

    def _length_inputs(self, g: Graph) -> None:
        g.input("seqlens", INT32, "B")
        g.input("total", INT32, 1)

    def _kv_edges(self, g: Graph, suffix: str) -> None:
        shape = ("B", self.config.kv_heads, "C", self.config.head_size)
        for part in ("key", "value"):
            g.input(f"past_{part}{suffix}", FLOAT, *shape)
            g.output(f"present_{part}{suffix}", FLOAT, *shape)

    def _first_norm(self, g: Graph, x: str) -> str:
        weight = g.weight(self._names[0].attn_norm, (self.config.width,))
        return g.op("SimplifiedLayerNormalization", [x, weight], axis=-1, epsilon=self.config.rms_eps, stash_type=1)

    def _skip_norm(self, g: Graph, x: str, added: str, weight: str, total: str) -> tuple[str, str]:
        """(x + added, its norm)."""
        normed = f"{total}.normed"
        g.ops("SkipSimplifiedLayerNormalization", [x, added, g.weight(weight, (self.config.width,))],
              [normed, "", "", total], CONTRIB, epsilon=self.config.rms_eps)
        return total, normed

    def _layer_end(self, g: Graph, x: str, attended: str, layer: int, out: str) -> tuple[str, str]:
        """O and MLP of `layer`, and the norm after it (the next layer's, or the final one)."""
        last = layer + 1 == self.config.layers
        return self._mlp(g, x, attended, layer, out, OUTPUT_NORM if last else self._names[layer + 1].attn_norm)

    def _mlp(self, g: Graph, x: str, attended: str, layer: int, out: str, norm_after: str) -> tuple[str, str]:
        x, normed = self._skip_norm(g, x, g.linear(attended, self._o[layer]), self._names[layer].ffn_norm,
                                    f"between.{layer}")
        gate, up = (g.linear(normed, matrices) for matrices in self._gate_up[layer])
        hidden = g.op("Mul", [g.op("Mul", [gate, g.op("Sigmoid", [gate])]), up])
        return self._skip_norm(g, x, g.linear(hidden, self._down[layer]), norm_after, out)

    def _qkv_of(self, g: Graph, normed: str, layer: int, output: str) -> str:
        c, names = self.config, self._names[layer]
        bias = g.weight(names.q_bias + "+", (self.qkv_width,)) if c.qkv_bias else None
        qkv = g.linear(normed, self._qkv[layer], bias)
        rotated, heads = c.q_width + c.kv_width, c.heads + c.kv_heads
        sizes = g.constant("qk and v", np.array([rotated, c.kv_width]))
        qk, v = g.ops("Split", [qkv, sizes], [f"qk.{layer}", f"v.{layer}"], axis=-1)
        if c.qk_norm:
            by_head = g.op("Reshape", [qk, g.constant("heads", np.array([-1, heads, c.head_size]))])
            ones = g.constant("ones", np.ones(c.head_size, np.float32))
            qk = g.op("SimplifiedLayerNormalization", [by_head, ones], axis=-1, epsilon=c.rms_eps, stash_type=1)
            qk = g.op("Mul", [qk, g.weight(names.q_norm + "+", (heads, c.head_size))])
        # One sequence whose position p is row p of cos and sin. (OpenVINO misreads a single offset instead of places.)
        qk = g.op("Reshape", [qk, g.constant("as sequence", np.array([1, -1, rotated]))])
        qk = g.op("RotaryEmbedding", [qk, "places", "cos", "sin"], domain=CONTRIB,
                  interleaved=int(c.rope.style == "norm"))
        qk = g.op("Reshape", [qk, g.constant("as rows", np.array([-1, rotated]))])
        if self.half_kv:
            q, k = g.ops("Split", [qk, g.constant("q and k", np.array([c.q_width, c.kv_width]))],
                         [f"q.{layer}", f"k.{layer}"], axis=-1)
            return g.op("Concat", [q, *(self._halved(g, part) for part in (k, v))], output, axis=-1)
        return g.op("Concat", [qk, v], output, axis=-1)

    def _halved(self, g: Graph, x: str) -> str:
        """float32 rounded to half precision. Without the type by Veltkamp's splitting, which leaves 11 of the 24
        leading bits; numbers below 6e-5 keep more of them than halves do, and ties may go the other way."""
        if self.half_casts:
            return g.op("Cast", [g.op("Cast", [x], to=10)], to=1)  # data types of ONNX: float16, float32
        scaled = g.op("Mul", [x, g.constant("splitter", np.array([2**13 + 1], np.float32))])
        return g.op("Sub", [scaled, g.op("Sub", [scaled, x])])

    def _attend(self, g: Graph, qkv: str, suffix: str, output: str) -> str:
        c = self.config
        sizes = g.constant("q, k, v", np.array([c.q_width, c.kv_width, c.kv_width]))
        parts = g.ops("Split", [qkv, sizes], [f"q.attend{suffix}", f"k.attend{suffix}", f"v.attend{suffix}"], axis=-1)
        past = [f"past_{part}{suffix}" for part in ("key", "value")]
        present = [f"present_{part}{suffix}" for part in ("key", "value")]
        g.ops("GroupQueryAttention", [*parts, *past, "seqlens", "total"], [output, *present], CONTRIB,
              num_heads=c.heads, kv_num_heads=c.kv_heads, scale=c.head_size**-0.5)
        return output

    def _head_of(self, g: Graph, x: str, attended: str, layers: int) -> None:
        """Only the wanted rows pass the last layer's O and MLP."""
        c = self.config
        g.input("rows", INT64, "m")
        g.input("logit_rows", INT64, "j")
        x = g.op("Gather", [x, "rows"], axis=0)
        attended = g.op("Gather", [attended, "rows"], axis=0)
        _, hidden = self._mlp(g, x, attended, layers - 1, "out", OUTPUT_NORM)
        g.output(hidden, FLOAT, "m", c.width)
        chosen = g.op("Gather", [hidden, "logit_rows"], axis=0)
        g.linear(chosen, self._head, output="logits")
        g.output("logits", FLOAT, "j", c.vocab_size)
