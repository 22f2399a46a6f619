"""How far a runtime's next-token distributions are from the float reference on the same dequantized weights."""
from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.apps.bench_client import Worker, WorkerError
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.reference import ReferenceModel

MODES = {"prompt": True, "decode": False}  # computed as one prompt, and token by token


@dataclass(frozen=True)
class Quality:
    """kl: KL(reference || runtime) in nats, mean over positions, by runtime and mode ("ours decode", "llama.cpp
    prompt"); agreement: share of positions where both runtimes' likeliest tokens are the same, decoding; explained:
    the same, counting those where the reference's gap between the two tokens is within each runtime's own error."""

    kl: dict[str, float]
    agreement: float | None
    explained: float | None
    positions: int

    def ratio(self) -> float | None:
        """Ours over llama.cpp's, the worse of both modes."""
        ratios = [self.kl[f"ours {mode}"] / self.kl[f"llama.cpp {mode}"] for mode in MODES
                  if self.kl.get(f"llama.cpp {mode}")]
        return max(ratios, default=None)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 [T, V]."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def divergence(reference: np.ndarray, logits: np.ndarray) -> float:
    """Mean over rows of KL(reference || logits), nats."""
    p, q = log_softmax(reference), log_softmax(logits)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def greedy(reference: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """(agreement, explained), see `Quality`."""
    mine, other = ours.argmax(-1), theirs.argmax(-1)
    same = mine == other
    rows = np.arange(len(reference))
    gap = np.abs(reference[rows, mine] - reference[rows, other])
    error = [np.abs(logits - reference).max(-1) for logits in (ours, theirs)]
    excused = (gap <= error[0]) & (gap <= error[1])
    return float(same.mean()), float((same | excused).mean())


def measure(path: Path, token_ids: list[int], ours: Worker, peer: Worker | None) -> Quality:
    """Both workers have the model loaded with room for the tokens."""
    with GGUFFile(path) as file:
        reference = ReferenceModel.load(file).forward(token_ids)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, worker in (("ours", ours), ("llama.cpp", peer)):
            for mode, as_prompt in MODES.items():
                out = str(Path(folder) / "logits.npy")
                if worker is None:
                    continue
                try:
                    worker.call("logits", token_ids=token_ids, out=out, as_prompt=as_prompt)
                except WorkerError:
                    if worker is ours:
                        raise
                    continue
                found[f"{name} {mode}"] = np.load(out)
    kl = {name: divergence(reference, logits) for name, logits in found.items()}
    agreement = explained = None
    if "llama.cpp decode" in found:
        agreement, explained = greedy(reference, found["ours decode"], found["llama.cpp decode"])
    return Quality(kl, agreement, explained, len(token_ids))
