"""ONNX graphs from a GGUF file's weights: the whole model, or segments cut at attention.

`matrices` re-lays blocks for MatMulNBits, `nodes` writes nodes, `decoder` puts them together. Only `nodes` needs the
package onnx, and only when it writes a graph.
"""
