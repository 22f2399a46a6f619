"""What `edge-runtime distill --config` reads: every choice of a distillation, checked before anything is computed."""
from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from edge_runtime.errors import InvalidRequestError, MissingExtraError

PRECISIONS = ("auto", "float32", "bfloat16")
CHOICES = ("even", "influence")
MOST_THREADS = 1024  # of the kernels' team; torch would end the process at some more


@dataclass(frozen=True)
class TeacherConfig:
    """model: a GGUF file, a folder of Hugging Face safetensors (llama, mistral, qwen2, qwen3), the name of a pulled
    model, or "bundled"."""

    model: str = ""


@dataclass(frozen=True)
class TextConfig:
    """files: .txt, .md, .jsonl files and folders of them. held_out: share of the rows, the last ones, that measure and
    never train. special: names of special tokens in the text count as those tokens (for rendered chats)."""

    files: tuple[str, ...] = ()
    held_out: float = 0.05
    special: bool = False


@dataclass(frozen=True)
class CacheConfig:
    """top_k: logits kept per token. folder: the output folder's `cache` unless given; runs may share one."""

    top_k: int = 64
    folder: str = ""


@dataclass(frozen=True)
class StudentConfig:
    """start: "teacher" (a smaller copy of it), "new" (random weights), or a GGUF file with the teacher's vocabulary.

    layers: how many; 0: the start's. keep: which of the start's, counted from 1, instead. choose: how `layers` are
    picked: "even", the first and last among them, or "influence", those that change the residual stream most
    (ShortGPT). kv_heads: groups of heads that stay; ffn: channels that stay; 0: all. The least important ones go.
    width, heads, head_size: of a "new" one; 0: the teacher's. exit_layers: after which of the student's layers it is
    trained to leave early, ascending.
    """

    start: str = "teacher"
    layers: int = 0
    keep: tuple[int, ...] = ()
    choose: str = "even"
    kv_heads: int = 0
    ffn: int = 0
    width: int = 0
    heads: int = 0
    head_size: int = 0
    exit_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class TrainingConfig:
    """context: tokens of a row. A step takes rows_per_step rows, rows_per_pass at a time (0: all at once).

    kl: share of the loss that is KL to the teacher at `temperature`; the rest is cross-entropy with the text. hidden:
    weight of matching the teacher's hidden states (the teacher is then held in torch too). exits: weight of an exit
    beside the full model; layer_dropout: rate of the last layer's. learning_rate: AdamW's, after a warmup of that share
    of the steps, on a cosine to zero. save_every: seconds between checkpoints. precision: of the products; auto:
    bfloat16 where the processor multiplies it. threads: 0: all cores.
    """

    steps: int = 1000
    context: int = 512
    rows_per_step: int = 8
    rows_per_pass: int = 0
    learning_rate: float = 3e-4
    warmup: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0
    temperature: float = 2.0
    kl: float = 0.9
    hidden: float = 0.0
    exits: float = 0.2
    layer_dropout: float = 0.0
    seed: int = 0
    save_every: float = 120.0
    precision: str = "auto"
    device: str = "cpu"
    threads: int = 0


@dataclass(frozen=True)
class ExportConfig:
    """type: of the quantized file, a name that `edge-runtime quantize` knows, or "" for the float file alone. name:
    `general.name`; unless given, the teacher's with "distilled" behind it."""

    type: str = "Q4_0"
    pure: bool = False
    name: str = ""


@dataclass(frozen=True)
class CurveConfig:
    """Of the stage "curve", size against quality. sizes: (layers, kv_heads, ffn) of each student, 0: all. method: of
    the importance, "activations" or "gradients". recover_steps: of the distillation that mends each student; 0: none.
    """

    sizes: tuple[tuple[int, ...], ...] = ()
    method: str = "activations"
    recover_steps: int = 0


@dataclass(frozen=True)
class DistillConfig:
    """One distillation. stage: "distill"; "curve": students of several sizes, measured; or a stage of the bundled
    model's own recipe, whose options are in `recipe`."""

    stage: str = "distill"
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    text: TextConfig = field(default_factory=TextConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    curve: CurveConfig = field(default_factory=CurveConfig)
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def checked(self) -> DistillConfig:
        """Itself. InvalidRequestError names the first value that cannot be."""
        t, s = self.training, self.student
        if not self.teacher.model:
            raise InvalidRequestError("teacher.model", "", "a GGUF file or a folder of safetensors")
        if not self.text.files:
            raise InvalidRequestError("text.files", [], "at least one file or folder of text")
        _share("text.held_out", self.text.held_out, most=0.5)
        _least("cache.top_k", self.cache.top_k, 1)
        for name in ("steps", "rows_per_step"):
            _least(f"training.{name}", getattr(t, name), 1)
        _least("training.context", t.context, 2)
        for name in ("rows_per_pass", "threads", "seed", "save_every", "hidden", "exits", "weight_decay"):
            _least(f"training.{name}", getattr(t, name), 0)
        for name in ("hidden", "exits", "weight_decay"):
            if getattr(t, name) == float("inf"):
                raise InvalidRequestError(f"training.{name}", getattr(t, name), "a finite number")
        if t.threads > MOST_THREADS:
            raise InvalidRequestError("training.threads", t.threads, f"at most {MOST_THREADS}")
        for name in ("learning_rate", "temperature", "clip"):
            if not 0 < getattr(t, name) < float("inf"):
                raise InvalidRequestError(f"training.{name}", getattr(t, name), "above 0")
        for name in ("warmup", "kl"):
            _share(f"training.{name}", getattr(t, name))
        _share("training.layer_dropout", t.layer_dropout, most=0.9)
        _one_of("training.precision", t.precision, PRECISIONS)
        _one_of("student.choose", s.choose, CHOICES)
        for name in ("layers", "kv_heads", "ffn", "width", "heads", "head_size"):
            _least(f"student.{name}", getattr(s, name), 0)
        if not s.start:
            raise InvalidRequestError("student.start", s.start, '"teacher", "new" or a GGUF file')
        if s.start != "new" and (s.width or s.heads or s.head_size):
            raise InvalidRequestError("student.start", s.start, '"new" where width, heads or head_size are given: only '
                                                                "layers, kv_heads and ffn of a model can be cut")
        if s.keep and s.layers not in (0, len(s.keep)):
            raise InvalidRequestError("student.layers", s.layers, f"left out, or {len(s.keep)} as student.keep names")
        if s.keep and s.start == "new":
            raise InvalidRequestError("student.keep", list(s.keep), "left out for a new student, which has none yet")
        if list(s.keep) != sorted(set(s.keep)) or any(layer < 1 for layer in s.keep):
            raise InvalidRequestError("student.keep", list(s.keep), "ascending layer numbers from 1")
        check_exit_layers(s.exit_layers, None)
        if self.stage == "curve":
            _check_curve(self.curve)
        if self.export.type:
            from edge_runtime.quant.mixtures import file_type

            file_type(self.export.type)
        return self


def _check_curve(curve: CurveConfig) -> None:
    if not curve.sizes:
        raise InvalidRequestError("curve.sizes", [], "at least one [layers, kv_heads, ffn]")
    for size in curve.sizes:
        if len(size) != 3 or min(size) < 0:
            raise InvalidRequestError("curve.sizes", list(size), "[layers, kv_heads, ffn], each from 0 (all) up")
    _one_of("curve.method", curve.method, ("activations", "gradients"))
    _least("curve.recover_steps", curve.recover_steps, 0)


def check_exit_layers(exits: tuple[int, ...], layers: int | None) -> None:
    """InvalidRequestError unless the exits ascend and lie below `layers`, where that is known."""
    below = "" if layers is None else f" to {layers - 1}, below the student's {layers} layers"
    if list(exits) != sorted(set(exits)) or any(e < 1 or (layers is not None and e >= layers) for e in exits):
        raise InvalidRequestError("student.exit_layers", list(exits), f"ascending layer numbers from 1{below}")


def read_config(path: str | os.PathLike[str]) -> DistillConfig:
    """A .toml or .json file. Relative paths in it are relative to its folder. InvalidRequestError names what is wrong;
    FileNotFoundError."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError("config", str(path), f"UTF-8; byte {error.start} is not") from error
    try:
        values = json.loads(text) if path.suffix.lower() == ".json" else _toml(text)
    except (ValueError, RecursionError) as error:  # both libraries' errors are ValueErrors
        kind = "JSON" if path.suffix.lower() == ".json" else "TOML"
        raise InvalidRequestError("config", str(path), f"{kind}: {error}") from error
    return located(config_from(values), path.parent)


def config_from(values: Any) -> DistillConfig:
    """From nested dicts. InvalidRequestError names an unknown key or a value of the wrong type."""
    config: DistillConfig = _build(DistillConfig, values, "")
    return config


def located(config: DistillConfig, folder: Path) -> DistillConfig:
    """Relative paths seen from `folder`."""
    def at(path: str) -> str:
        return str(folder / Path(path).expanduser()) if path else path

    start = config.student.start
    return dataclasses.replace(
        config, teacher=TeacherConfig(_model_at(config.teacher.model, folder)),
        text=dataclasses.replace(config.text, files=tuple(map(at, config.text.files))),
        cache=dataclasses.replace(config.cache, folder=at(config.cache.folder)),
        student=config.student if start in ("teacher", "new") else dataclasses.replace(config.student, start=at(start)))


def _model_at(model: str, folder: Path) -> str:
    from edge_runtime.models.hub import is_name

    path = folder / Path(model).expanduser()
    return model if model in ("", "bundled") or (is_name(model) and not path.exists()) else str(path)


def _toml(text: str) -> Any:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib  # type: ignore[no-redef,import-not-found,unused-ignore]
        except ImportError:
            raise MissingExtraError("tomli", "distill", "Reading TOML with Python 3.10") from None
    return tomllib.loads(text)


def _build(kind: Any, values: Any, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise InvalidRequestError(prefix.rstrip(".") or "config", values, "a table of keys and values")
    hints, names = get_type_hints(kind), [f.name for f in dataclasses.fields(kind)]
    for key in values:
        if key not in names:
            raise InvalidRequestError("config", f"{prefix}{key}", f"one of {', '.join(prefix + n for n in names)}")
    return kind(**{key: _value(hints[key], value, prefix + key) for key, value in values.items()})


def _value(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, name + ".")
    origin = get_origin(hint)
    if origin is tuple:
        element = get_args(hint)[0]
        if isinstance(value, str) and element is str:  # one file
            value = [value]
        if not isinstance(value, (list, tuple)):
            raise InvalidRequestError(name, value, "a list")
        return tuple(_value(element, item, f"{name}[{i}]") for i, item in enumerate(value))
    if origin is not None:
        if not isinstance(value, Mapping):
            raise InvalidRequestError(name, value, "a table of keys and values")
        return dict(value)
    words = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}[hint]
    right = isinstance(value, (int, float)) if hint is float else isinstance(value, hint)
    if not right or (isinstance(value, bool) and hint is not bool):
        raise InvalidRequestError(name, value, words)
    return hint(value)


def _least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise InvalidRequestError(name, value, f"at least {least}")


def _share(name: str, value: float, most: float = 1.0) -> None:
    if not 0 <= value <= most:
        raise InvalidRequestError(name, value, f"from 0 to {most:g}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidRequestError(name, value, f"one of {', '.join(allowed)}")
