"""A graph under construction: nodes and initializers in plain Python, written as an ONNX model at the end."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_runtime.errors import MissingExtraError
from edge_runtime.models.graph.matrices import Matrix

CONTRIB = "com.microsoft"
OPSET = 21
IR_VERSION = 10
WEIGHTS_FILE = "weights"  # where initializers say that they lie; sessions get them as values, never from a file
FLOAT, INT64, INT32 = "float32", "int64", "int32"


@dataclass(frozen=True)
class Placed:
    """A value of the graph's edge: name, NumPy type, dimensions (a name: free)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphModel:
    """A finished graph. proto: serialized ModelProto; weights: names of initializers that the session must be given
    (shapes and types as in `DecoderGraphs.arrays`)."""

    name: str
    proto: bytes
    inputs: tuple[Placed, ...]
    outputs: tuple[Placed, ...]
    weights: tuple[str, ...]


class Graph:
    """accuracy_level: of MatMulNBits; 1 computes in float32, 4 rounds its input to int8."""

    def __init__(self, name: str, accuracy_level: int = 1):
        self.name, self.accuracy_level = name, accuracy_level
        self.inputs: list[Placed] = []
        self.outputs: list[Placed] = []
        self._nodes: list[tuple[str, str, list[str], list[str], dict[str, Any]]] = []
        self._constants: dict[str, np.ndarray] = {}
        self._weights: dict[str, tuple[tuple[int, ...], np.dtype]] = {}

    def input(self, name: str, dtype: str, *shape: int | str) -> str:
        self.inputs.append(Placed(name, dtype, shape))
        return name

    def output(self, name: str, dtype: str, *shape: int | str) -> str:
        self.outputs.append(Placed(name, dtype, shape))
        return name

    def op(self, kind: str, inputs: Sequence[str], output: str | None = None, domain: str = "",
           **attributes: Any) -> str:
        """Adds a node with one output and returns its name."""
        return self.ops(kind, inputs, [output or f"{kind}.{len(self._nodes)}"], domain, **attributes)[0]

    def ops(self, kind: str, inputs: Sequence[str], outputs: list[str], domain: str = "",
            **attributes: Any) -> list[str]:
        """Adds a node; an output named "" is left out."""
        self._nodes.append((kind, domain, list(inputs), outputs, attributes))
        return outputs

    def constant(self, name: str, values: Any) -> str:
        """A small tensor that lies in the graph itself."""
        self._constants[name] = np.asarray(values)
        return name

    def weight(self, name: str, shape: tuple[int, ...], dtype: np.dtype | type = np.float32) -> str:
        """A tensor that the session is given."""
        self._weights[name] = (shape, np.dtype(dtype))
        return name

    def linear(self, x: str, matrices: Sequence[Matrix], bias: str | None = None, output: str | None = None) -> str:
        """x [n, inputs] @ matrices.T, side by side; bias: a weight as wide as all of them."""
        parts, sums = [], ""
        for matrix in matrices:
            if matrix.layout.offsets and not sums:
                shape = self.constant(f"blocks.{matrix.inputs}", np.array([-1, matrix.blocks, matrix.layout.block]))
                sums = self.op("ReduceSum", [self.op("Reshape", [x, shape]), self.constant("last", np.array([-1]))],
                               keepdims=0)
            parts.append(self._product(x, sums, matrix))
        out = parts[0] if len(parts) == 1 else self.op("Concat", parts, axis=-1)
        if bias is not None:
            out = self.op("Add", [out, bias])
        if output is not None:
            self._rename(out, output)
        return output or out

    def _product(self, x: str, sums: str, matrix: Matrix) -> str:
        base = weights_name(matrix)
        named = {part: self.weight(f"{base}.{part}", shape, dtype) for part, (shape, dtype) in matrix.parts().items()}
        if matrix.layout.bits == 32:
            return self.op("MatMul", [x, named["weights"]])
        out = self.op("MatMulNBits", [x, named["codes"], named["scales"]], domain=CONTRIB, K=matrix.inputs,
                      N=matrix.outputs, bits=matrix.layout.bits, block_size=matrix.layout.block,
                      accuracy_level=self.accuracy_level)
        if matrix.layout.offsets:
            out = self.op("Add", [out, self.op("MatMul", [sums, named["offsets"]])])
        return out

    def _rename(self, old: str, new: str) -> None:
        for _, _, inputs, outputs, _ in self._nodes:
            inputs[:] = [new if name == old else name for name in inputs]
            outputs[:] = [new if name == old else name for name in outputs]

    def model(self) -> GraphModel:
        """Raises MissingExtraError where the package onnx is not installed."""
        onnx = onnx_package()
        helper = onnx.helper
        code = lambda dtype: helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        value = lambda p: helper.make_tensor_value_info(p.name, code(p.dtype), list(p.shape))
        nodes = [helper.make_node(kind, inputs, outputs, name=f"{kind} {i} of {self.name}", domain=domain, **attributes)
                 for i, (kind, domain, inputs, outputs, attributes) in enumerate(self._nodes)]
        tensors = [onnx.numpy_helper.from_array(array, name) for name, array in self._constants.items()]
        for name, (shape, dtype) in self._weights.items():
            tensor = onnx.TensorProto(name=name, data_type=code(dtype), dims=shape,
                                      data_location=onnx.TensorProto.EXTERNAL)
            for key, text in (("location", WEIGHTS_FILE), ("offset", "0"),
                              ("length", str(int(np.prod(shape)) * dtype.itemsize))):
                tensor.external_data.add(key=key, value=text)
            tensors.append(tensor)
        graph = helper.make_graph(nodes, self.name, [value(p) for p in self.inputs], [value(p) for p in self.outputs],
                                  tensors)
        model = helper.make_model(graph, ir_version=IR_VERSION, producer_name="edge-runtime", opset_imports=[
            helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)])
        return GraphModel(self.name, model.SerializeToString(), tuple(self.inputs), tuple(self.outputs),
                          tuple(self._weights))


def weights_name(matrix: Matrix) -> str:
    return "+".join(matrix.names)


def onnx_package() -> Any:
    try:
        import onnx
        import onnx.helper
        import onnx.numpy_helper
    except ImportError as error:
        raise MissingExtraError("onnx", "onnx", "An ONNX device") from error
    return onnx
