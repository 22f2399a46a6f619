"""A distillation from its config to a model file: teacher's logits, student, training, files. Needs the extra
`distill`.

The output folder holds `config.json`, `cache/` (unless the config names another), `checkpoint.safetensors`,
`log.jsonl`, `result.json`, the student as floats (`student-f32.gguf`) and quantized (`student-q4_0.gguf`, by its type).
"""
from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.conversion import convert_folder, is_model_folder
from edge_runtime.errors import CorruptModelError, InvalidRequestError, MissingExtraError
from edge_runtime.loading import fingerprint, resolve
from edge_runtime.models.config import config_from_gguf
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.quantize_file import quantize_gguf
from edge_runtime.models.recipes.distill_config import DistillConfig
from edge_runtime.models.recipes.logit_cache import LogitCache, Manifest, write_json
from edge_runtime.models.recipes.text_rows import TextRows, find_texts, read_texts, text_rows
from edge_runtime.teacher import Teacher, vocabulary_fingerprint
from edge_runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edge_runtime.models.recipes.distill import Distillation

CALIBRATION_ROWS = 32  # rows of the training text that decide what is pruned
CONFIG, RESULT = "config.json", "result.json"

Progress = Callable[[str, int, int, dict[str, Any]], object]


@dataclass(frozen=True)
class Distilled:
    """model: the file to use, quantized where the config asks for it; floats: the same in float32. before, after:
    held-out figures of the student as it was made and as it was trained (see `Distillation.measure`)."""

    model: Path
    floats: Path
    parameters: int
    teacher_parameters: int
    before: dict[str, Any]
    after: dict[str, Any]
    steps: int
    seconds: float
    cache_bytes: int
    bytes_per_token: int


def require_distill_extra() -> None:
    """MissingExtraError where torch or safetensors is not installed."""
    for package in ("torch", "safetensors"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "distill", "Distilling a model")


def distill(config: DistillConfig, out: str | os.PathLike[str], *, resume: bool = False,
            progress: Progress | None = None) -> Distilled:
    """Runs the whole distillation and returns what it made. progress: (phase, done, all, figures); the phases are
    "teacher" and "training".

    resume: go on with what the folder holds, to the same losses; without it a folder with a checkpoint is refused.
    Raises InvalidRequestError for the config, the text and a cache or checkpoint of something else,
    UnsupportedModelError for models, vocabularies and types, MissingExtraError, OSError for a full disk, after which
    what was written before is whole.
    """
    config = config.checked()
    require_distill_extra()
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise InvalidRequestError("out", str(out), "a folder")
    from edge_runtime.models.recipes.distill import CHECKPOINT

    started = (out / CHECKPOINT).exists()
    if started and not resume:
        raise InvalidRequestError("out", str(out), "an empty folder, or add --resume to go on with the training in it")
    with ExitStack() as stack:
        source = model_file(config.teacher.model, out / "teacher.gguf")
        file = stack.enter_context(GGUFFile(source))
        teacher = config_from_gguf(file)
        if config.training.context > teacher.context_length:
            raise InvalidRequestError("training.context", config.training.context,
                                      f"at most {teacher.context_length}, the teacher's")
        tokenizer = Tokenizer.from_metadata(file.metadata)
        text = text_of(config, tokenizer)
        out.mkdir(parents=True, exist_ok=True)
        cache = cache_of(config, out, source, tokenizer, text, teacher.vocab_size)
        run, before = _begin(config, out, file, tokenizer, text, cache, started)
        write_json(out / CONFIG, dataclasses.asdict(config))
        ask_teacher(config, source, cache, progress)
        if before is None:
            before = run.measure()
            write_json(out / RESULT, {"before": before})
        run.run((lambda done, total, entry: progress("training", done, total, entry)) if progress else None)
        result = _write(config, out, file, run, before, cache)
    write_json(out / RESULT, {key: str(value) if isinstance(value, Path) else value
                              for key, value in dataclasses.asdict(result).items()})
    return result


def model_file(model: str, converted: Path) -> Path:
    """The GGUF file of a model that a config names; a folder of safetensors is rewritten, once, as `converted`."""
    folder = Path(model).expanduser()
    if not is_model_folder(folder):
        return resolve(None if model == "bundled" else model)
    newest = max(path.stat().st_mtime_ns for path in folder.iterdir())
    if converted.exists() and converted.stat().st_mtime_ns >= newest:
        return converted
    converted.parent.mkdir(parents=True, exist_ok=True)
    return convert_folder(folder, converted)


def text_of(config: DistillConfig, tokenizer: Tokenizer) -> TextRows:
    """The config's text in the teacher's tokens."""
    texts = (text for path in find_texts(config.text.files) for text in read_texts(path))
    return text_rows(texts, lambda text: tokenizer.encode(text, parse_special=config.text.special), tokenizer.eos_id,
                     config.training.context)


def cache_of(config: DistillConfig, out: Path, teacher: Path, tokenizer: Tokenizer, text: TextRows,
             vocab_size: int) -> LogitCache:
    """The cache for this teacher, text and setting, made or gone on with."""
    if config.cache.top_k > vocab_size:
        raise InvalidRequestError("cache.top_k", config.cache.top_k, f"at most {vocab_size}, the teacher's vocabulary")
    manifest = Manifest(
        teacher=fingerprint(teacher), tokenizer=vocabulary_fingerprint(tokenizer), text=text.digest,
        tokens=len(text.tokens), vocab_size=vocab_size, context=text.context, top_k=config.cache.top_k,
        temperatures=tuple(sorted({1.0, float(config.training.temperature)})))
    return LogitCache(config.cache.folder or out / "cache", manifest, text)


def ask_teacher(config: DistillConfig, source: Path, cache: LogitCache, progress: Progress | None) -> None:
    """Fills what the cache lacks."""
    if cache.complete:
        return
    with Teacher(source, context=config.training.context, threads=config.training.threads or None) as teacher:
        cache.fill(teacher.logits,
                   (lambda done, total: progress("teacher", done, total, {})) if progress else None)


def _begin(config: DistillConfig, out: Path, file: GGUFFile, tokenizer: Tokenizer, text: TextRows, cache: LogitCache,
           started: bool) -> tuple[Distillation, dict[str, Any] | None]:
    """The distillation at its first step, or where its checkpoint left it; and the figures before training where they
    are known."""
    import torch

    from edge_runtime.models.recipes.distill import Distillation, checkpoint_shape
    from edge_runtime.models.recipes.network_file import load_network_file
    from edge_runtime.models.recipes.student import make_student

    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    if started:
        student, layer_map = checkpoint_shape(out)
        network = load_network_file(file) if config.training.hidden else None
        run = Distillation(student, text, cache, config, out, teacher=network, layer_map=layer_map)
        run.restore()
        return run, _known_before(out / RESULT)
    rows = [torch.from_numpy(text.inputs(row)).long() for row in text.split(config.text.held_out)[0][:CALIBRATION_ROWS]]
    wanted = config.student
    if wanted.start not in ("teacher", "new"):
        wanted = dataclasses.replace(wanted, start=str(model_file(wanted.start, out / "start.gguf")))
    same = lambda other: vocabulary_fingerprint(Tokenizer.from_metadata(other.metadata)) == cache.manifest.tokenizer
    made = make_student(wanted, file, rows, config.training.seed, same)
    network = load_network_file(file) if config.training.hidden else None
    return Distillation(made.network, text, cache, config, out, teacher=network, layer_map=made.layer_map), None


def _known_before(path: Path) -> dict[str, Any]:
    """The figures before training, of a result file; none where it is gone. CorruptModelError: it is damaged."""
    if not path.exists():
        return {}
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["before"]
        if not isinstance(before, dict):
            raise TypeError(f"before is {before!r}")
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptModelError(path, 0, f"no result of a distillation ({error}); the training goes on without it "
                                         "once it is deleted") from error
    return before


def _write(config: DistillConfig, out: Path, file: GGUFFile, run: Distillation, before: dict[str, Any],
           cache: LogitCache) -> Distilled:
    from edge_runtime.models.recipes.network_file import network_config, write_network_file

    teacher = config_from_gguf(file)
    floats = write_network_file(out / "student-f32.gguf", run.network, file,
                                name=config.export.name or f"{teacher.name} distilled", exit_layers=run.exits)
    model = floats
    if config.export.type and config.export.type.upper() != "F32":
        model = quantize_gguf(floats, out / f"student-{config.export.type.lower()}.gguf", config.export.type,
                              pure=config.export.pure)
    return Distilled(
        model=model, floats=floats, parameters=run.network.config.parameters,
        teacher_parameters=network_config(teacher).parameters, before=before, after=run.measure(), steps=run.step,
        seconds=round(run.seconds, 1), cache_bytes=cache.manifest.file_bytes,
        bytes_per_token=cache.manifest.bytes_per_token)
