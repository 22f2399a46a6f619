"""Models that come as a Hugging Face folder, made into one GGUF file, which is what the runtime reads."""
from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from edge_runtime.errors import InvalidRequestError
from edge_runtime.hf_tokenizer import tokenizer_metadata
from edge_runtime.models.hf_config import read_hf_config
from edge_runtime.models.safetensors_file import is_model_folder
from edge_runtime.models.safetensors_model import write_folder

__all__ = ["as_gguf", "convert_folder", "is_model_folder"]

Progress = Callable[[int, int], object]


def convert_folder(folder: str | os.PathLike[str], target: str | os.PathLike[str],
                   progress: Progress | None = None) -> Path:
    """Writes a folder of config.json, tokenizer.json and safetensors (llama, mistral, qwen2, qwen3; F32, F16, BF16) as
    a GGUF file of the same float types, and returns its path. The file appears when it is complete.

    ModelNotFoundError, CorruptModelError, UnsupportedModelError: see `models.safetensors_model` and `hf_tokenizer`.
    """
    folder, target = Path(folder), Path(target)
    if target.is_dir():
        raise InvalidRequestError("target", str(target), "a file, not a folder")
    config = read_hf_config(folder)
    tokenizer = tokenizer_metadata(folder, config.vocab_size, config.bos_id, config.eos_ids)
    return write_folder(folder, target, tokenizer, progress)


@contextlib.contextmanager
def as_gguf(source: str | os.PathLike[str], beside: str | os.PathLike[str]) -> Iterator[Path]:
    """The source itself, or for a model's folder a float GGUF file beside `beside`, which is gone afterwards."""
    source = Path(source)
    if not is_model_folder(source):
        yield source
        return
    with tempfile.TemporaryDirectory(prefix=".converting-", dir=Path(beside).parent) as scratch:
        yield convert_folder(source, Path(scratch) / "model.gguf")
