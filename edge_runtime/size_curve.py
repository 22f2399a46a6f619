"""Size against quality: students of several sizes pruned from one model, measured before and after a short recovery."""
from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.distillation import (
    CALIBRATION_ROWS,
    Progress,
    ask_teacher,
    cache_of,
    model_file,
    require_distill_extra,
    text_of,
)
from edge_runtime.errors import InvalidRequestError
from edge_runtime.models.config import config_from_gguf
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.recipes.distill_config import DistillConfig
from edge_runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edge_runtime.models.recipes.network import Network
    from edge_runtime.models.recipes.prune import SizePoint

RESULT = "curve.json"


def size_curve(config: DistillConfig, out: str | os.PathLike[str], *, resume: bool = False,
               progress: Progress | None = None,
               report: Callable[[SizePoint], object] = lambda point: None) -> list[SizePoint]:
    """A `SizePoint` for each size of `config.curve`, written to `curve.json` in the folder `out` as well.

    Students are pruned by what the training rows need and measured on the held-out ones. With `recover_steps` each is
    mended by a distillation of that many steps, in a folder of its own; resume: those that are there go on. report:
    gets each point as it is known. Raises what `distill` raises.
    """
    config = dataclasses.replace(config, stage="curve").checked()
    require_distill_extra()
    import torch

    from edge_runtime.models.recipes.distill import CHECKPOINT, Distillation
    from edge_runtime.models.recipes.network_file import load_network_file
    from edge_runtime.models.recipes.prune import curve

    out, steps = Path(out), config.curve.recover_steps
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    with GGUFFile(model_file(config.teacher.model, out / "teacher.gguf")) as file:
        teacher = config_from_gguf(file)
        if config.training.context > teacher.context_length:
            raise InvalidRequestError("training.context", config.training.context,
                                      f"at most {teacher.context_length}, the model's")
        tokenizer = Tokenizer.from_metadata(file.metadata)
        text = text_of(config, tokenizer)
        train, held_out = text.split(config.text.held_out)
        rows = lambda numbers: [torch.from_numpy(text.tokens[text.start(n) : text.start(n) + text.context + 1]).long()
                                for n in numbers]
        network = load_network_file(file)
        out.mkdir(parents=True, exist_ok=True)
        recovery = dataclasses.replace(
            config, training=dataclasses.replace(config.training, steps=max(1, steps), hidden=0.0),
            student=dataclasses.replace(config.student, exit_layers=()))
        if steps:
            cache = cache_of(config, out, file.path, tokenizer, text, teacher.vocab_size)
            ask_teacher(config, file.path, cache, progress)

        def recover(student: Network) -> Network:
            c = student.config
            folder = out / f"{c.layers}-{c.kv_heads}-{c.ffn}"
            started = (folder / CHECKPOINT).exists()
            if started and not resume:
                raise InvalidRequestError("out", str(folder), "an empty folder, or add --resume to go on with it")
            folder.mkdir(parents=True, exist_ok=True)
            run = Distillation(student, text, cache, recovery, folder)
            if started:
                run.restore()
            run.run((lambda done, total, entry: progress(folder.name, done, total, entry)) if progress else None)
            return run.network

        points = curve(network, rows(train[:CALIBRATION_ROWS]), rows(held_out or train), [
            (layers, kv_heads, ffn) for layers, kv_heads, ffn in config.curve.sizes], type=config.export.type or "F32",
            method=config.curve.method, recover=recover if steps else None, report=report)
    (out / RESULT).write_text(json.dumps([dataclasses.asdict(point) for point in points], indent=1), encoding="utf-8")
    return points
