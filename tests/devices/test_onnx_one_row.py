"""One decoded row over KV of every length: the graph that streams on the CPU provider, against NumPy in float64."""
from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from edge_runtime.devices.onnx import OnnxAccelerator
from edge_runtime.kernels.attention_reference import attend
from edge_runtime.models.config import config_from_gguf
from edge_runtime.models.gguf_file import GGUFFile
from tests.gguf_factory import write_model


@pytest.mark.parametrize("heads,kv_heads,head_size", [(4, 2, 32), (7, 1, 64), (3, 3, 48)])
def test_a_row_over_what_a_sequence_holds(heads, kv_heads, head_size, tmp_path):
    """Lengths around blocks of 64 and 128 tokens, and 129 in a capacity that only blocks of 64 divide."""
    seed = 6
    print("seed", seed)
    rng = np.random.default_rng(seed)
    path = write_model(tmp_path / "m.gguf", width=64, heads=heads, kv_heads=kv_heads, head_size=head_size, layers=1)
    with GGUFFile(path) as file, closing(
            OnnxAccelerator(file, config_from_gguf(file), kv_budget_bytes=16 << 20, context=1024)) as accelerator:

        def check(tokens: int) -> None:
            kv = rng.standard_normal((1, 2, kv_heads, tokens, head_size)).astype(np.float32)
            queries = 2 * rng.standard_normal((1, heads, head_size)).astype(np.float32)
            sequence = accelerator.kv.open(tokens)
            accelerator.kv.write(sequence, 0, kv)
            found = [accelerator.attend_partial(0, queries, sequence), accelerator.attend_over(queries, kv[0])]
            if tokens > 20:  # what stood there before may be anything but NaN
                sequence.length = tokens - 20
                found.append(accelerator.attend_partial(0, queries, sequence))
            accelerator.kv.close(sequence)
            for (out, lse), seen in zip(found, (tokens, tokens, tokens - 20)):
                want, want_lse = attend(queries, *kv[0, :, :, :seen].transpose(0, 2, 1, 3), seen - 1)
                assert np.abs(out - want).max() < 1e-5 and np.abs(lse - want_lse).max() < 1e-5, (tokens, seen)

        accelerator.submit(lambda: [check(t) for t in (1, 63, 64, 65, 128, 129, 192, 500, 1024)]).result()
