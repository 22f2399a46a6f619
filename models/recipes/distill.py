"""The training loop of a distillation: a student, cached logits of its teacher, and a folder that survives kills.

The folder holds checkpoint.safetensors (replaced as a whole) and log.jsonl. A batch is a function of seed and step, so
a run that was killed and resumed gives the losses of an unbroken one.
"""
from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from edge_runtime.errors import CorruptModelError, DeviceError, InvalidRequestError, NumericalError
from edge_runtime.kernels.isa import current

from .checkpoint import cut_log, load_checkpoint, restore_training, save_checkpoint, training_tensors
from .config import network_from_json
from .distill_config import DistillConfig, TrainingConfig
from .logit_cache import LogitCache, TopLogits
from .losses import dropout_rates, exit_weights, hidden_match, top_k_kl
from .network import Network
from .text_rows import TextRows

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"
HEAD_VALUES = 1 << 24  # logits computed and kept at once: 64 MB of float32, times a few in the losses

Report = Callable[[int, int, dict[str, Any]], object]


@dataclass(frozen=True)
class Batch:
    """Flattened rows: N = rows * context positions. tokens: int64 [rows, context]; targets: int64 [N]; weights: float32
    [N]; ids: int64 [N, k]; values: float32 [N, k]; rest: float32 [N]."""

    tokens: Tensor
    targets: Tensor
    weights: Tensor
    ids: Tensor
    values: Tensor
    rest: Tensor


class Distillation:
    """A student in training. `run` goes on to the last step, `measure` says how good it is.

    teacher: in torch, for matching hidden states; layer_map: for each student layer the teacher's, both from 1.
    """

    def __init__(self, network: Network, text: TextRows, cache: LogitCache, config: DistillConfig, folder: Path, *,
                 teacher: Network | None = None, layer_map: Sequence[int] | None = None):
        t = config.training
        if t.hidden and (teacher is None or layer_map is None):
            raise InvalidRequestError("training.hidden", t.hidden, '0 unless student.start is "teacher": hidden states '
                                                                   "are matched layer by layer")
        self.config, self.text, self.cache, self.folder = config, text, cache, folder
        self.device = _device(t.device)
        self.network = network.to(self.device)
        self.teacher = teacher.to(self.device).eval().requires_grad_(False) if t.hidden and teacher else None
        self.layer_map = tuple(layer_map or ())
        self.train_rows, self.held_out = text.split(config.text.held_out)
        self.exits = config.student.exit_layers
        self.step, self.seconds = 0, 0.0
        self.optimizer = _optimizer(self.network, t)

    # Resuming

    def restore(self) -> None:
        """Goes on from the folder's checkpoint. InvalidRequestError: it is of another config, which is named."""
        tensors, state = load_checkpoint(self.folder / CHECKPOINT)
        _same_config(state["config"], self._identity(), self.folder)
        restore_training(self.network, [self.optimizer], tensors)
        self.step, self.seconds = state["step"], state["seconds"]
        cut_log(self.folder / LOG, self.step)

    def save(self) -> None:
        save_checkpoint(self.folder / CHECKPOINT, training_tensors(self.network, [self.optimizer]), {
            "step": self.step, "seconds": round(self.seconds, 3), "network": asdict(self.network.config),
            "layer_map": list(self.layer_map), "config": self._identity()})

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on as it began."""
        m = self.cache.manifest
        return resumable(self.config) | {"source": {"teacher": m.teacher, "text": m.text, "top_k": m.top_k}}

    # Training

    def run(self, report: Report | None = None) -> None:
        """Trains to `training.steps`; a checkpoint every `save_every` seconds and at the end.

        NumericalError where the loss is not finite; OSError, with the last checkpoint whole, where the disk is full.
        """
        t = self.config.training
        torch.set_num_threads(t.threads or torch.get_num_threads())
        self.network.train()
        began = saved = time.monotonic() - self.seconds
        if self.step == 0:
            (self.folder / LOG).write_text("")
            self.save()
        saved = time.monotonic()
        while self.step < t.steps:
            step_began = time.monotonic()
            entry = self._step()
            self.step += 1
            now = time.monotonic()
            self.seconds = now - began
            tokens = t.rows_per_step * t.context
            entry |= {"tokens": tokens, "tokens_per_second": round(tokens / (now - step_began)),
                      "seconds": round(self.seconds, 1)}
            with (self.folder / LOG).open("a") as file:
                file.write(json.dumps(entry) + "\n")
            if now - saved >= t.save_every or self.step == t.steps:
                self.save()
                saved = time.monotonic()
            if report:
                report(self.step, t.steps, entry)
        self.network.eval()

    def _step(self) -> dict[str, Any]:
        t = self.config.training
        rows = step_rows(self.train_rows, t, self.step)
        size = t.rows_per_pass or len(rows)
        dropped = self._dropped()
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            share = len(part) / len(rows)
            loss, parts = self._loss(self._batch(part, t.temperature), dropped)
            (loss * share).backward()
            for name, value in {"loss": loss.detach(), **parts}.items():
                sums[name] = sums.get(name, 0.0) + float(value) * share
        if not math.isfinite(sums["loss"]):
            raise NumericalError(f"the loss of step {self.step} is {sums['loss']}: lower training.learning_rate and "
                                 f"start again")
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), t.clip)
        rate = t.learning_rate * rate_share(t, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return {"step": self.step, **{name: round(value, 6) for name, value in sums.items()},
                "norm": round(float(norm), 4), "rate": rate}

    def _loss(self, batch: Batch, dropped: set[int]) -> tuple[Tensor, dict[str, Tensor]]:
        t, c = self.config.training, self.network.config
        with self._autocast():
            states = self.network.residuals(batch.tokens, dropped)
        weights = exit_weights(self.exits, c.layers, self.step / t.steps, t.exits)
        total = torch.zeros((), device=self.device)
        parts: dict[str, Tensor] = {}
        for layer, weight in weights.items():
            kl, entropy = self._head(states[layer], batch, t.temperature)
            loss = t.kl * kl + (1 - t.kl) * entropy
            total = total + weight * loss
            name = "" if layer == c.layers else f"_exit{layer}"
            parts |= {f"kl{name}": kl.detach(), f"entropy{name}": entropy.detach()}
        if self.teacher is not None:
            with torch.no_grad(), self._autocast():
                wanted = self.teacher.residuals(batch.tokens)
            gap = torch.stack([hidden_match(states[mine + 1], wanted[theirs])
                               for mine, theirs in enumerate(self.layer_map)]).mean()
            total = total + t.hidden * gap
            parts["hidden"] = gap.detach()
        return total, parts

    def _head(self, state: Tensor, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
        """Weighted means of KL and cross-entropy after a layer, by pieces of positions whose logits fit memory."""
        hidden = self.network.final_norm(state).flatten(0, 1)
        size = max(1, HEAD_VALUES // self.network.config.vocab_size)

        def piece(h: Tensor, weight: Tensor, here: slice) -> Tensor:
            with self._autocast():
                logits = F.linear(h, weight).float()
            kl = top_k_kl(logits, batch.ids[here], batch.values[here], batch.rest[here], temperature)
            entropy = F.cross_entropy(logits, batch.targets[here], reduction="none")
            return torch.stack([(kl * batch.weights[here]).sum(), (entropy * batch.weights[here]).sum()])

        sums, matrix = torch.zeros(2, device=self.device), self.network.output_weight
        for first in range(0, len(hidden), size):
            here = slice(first, first + size)
            if len(hidden) <= size or not torch.is_grad_enabled():
                sums = sums + piece(hidden[here], matrix, here)
            else:
                sums = sums + recompute(piece, hidden[here], matrix, here, use_reentrant=False)
        sums = sums / batch.weights.sum().clamp_min(1e-12)
        return sums[0], sums[1]

    def _dropped(self) -> set[int]:
        """Layer dropout: one draw for all rows of a step. The last layer stays: its loss is the full model's."""
        rates = dropout_rates(self.network.config.layers, self.config.training.layer_dropout)
        rng = random.Random(f"dropout/{self.config.training.seed}/{self.step}")
        return {layer for layer, rate in enumerate(rates) if rng.random() < rate}

    def _batch(self, rows: Sequence[int], temperature: float) -> Batch:
        found: list[TopLogits] = [self.cache.row(row, temperature) for row in rows]

        def tensor(arrays: Sequence[np.ndarray], kind: type) -> Tensor:
            return torch.from_numpy(np.concatenate(arrays).astype(kind)).to(self.device)

        tokens = torch.from_numpy(np.stack([self.text.inputs(row) for row in rows]).astype(np.int64)).to(self.device)
        return Batch(tokens, tensor([self.text.targets(row) for row in rows], np.int64),
                     tensor([self.text.weights(row) for row in rows], np.float32),
                     tensor([f.ids for f in found], np.int64), tensor([f.values for f in found], np.float32),
                     tensor([f.rest for f in found], np.float32))

    def _autocast(self) -> AbstractContextManager[Any]:
        precision = self.config.training.precision
        if precision == "auto":
            fast = self.device.type != "cpu" or current().matrix_tiles
            precision = "bfloat16" if fast else "float32"
        return torch.autocast(self.device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()

    # Measuring

    @torch.no_grad()
    def measure(self, rows: Sequence[int] | None = None) -> dict[str, Any]:
        """On the held-out rows, the training's where there are none: perplexity, KL to the teacher at temperature 1 in
        nats per token, and the same for each exit."""
        chosen = list(rows if rows is not None else self.held_out or self.train_rows)
        layers = [*self.exits, self.network.config.layers]
        sums, count = np.zeros((len(layers), 2)), 0.0
        was_training = self.network.training
        self.network.eval()
        for row in chosen:
            batch = self._batch([row], 1.0)
            with self._autocast():
                states = self.network.residuals(batch.tokens)
            weight = float(batch.weights.sum())
            count += weight
            for i, layer in enumerate(layers):
                kl, entropy = self._head(states[layer], batch, 1.0)
                sums[i] += float(kl) * weight, float(entropy) * weight
        self.network.train(was_training)
        found = [{"kl": round(kl, 6), "perplexity": round(math.exp(min(entropy, 700.0)), 4)}
                 for kl, entropy in (sums / count).tolist()]
        return {"rows": len(chosen), "held_out": rows is None and bool(self.held_out), **found[-1],
                "exits": dict(zip(map(str, self.exits), found))}


def checkpoint_shape(folder: Path) -> tuple[Network, tuple[int, ...] | None]:
    """An untrained network of the shape that the folder's checkpoint has, and its layer map: to resume without making
    the student again."""
    _, state = load_checkpoint(folder / CHECKPOINT)
    try:
        missing = {"network", "layer_map", "config", "step", "seconds"} - set(state)
        if missing:
            raise KeyError(", ".join(sorted(missing)))
        return Network(network_from_json(state["network"])), tuple(state["layer_map"]) or None
    except (KeyError, TypeError) as error:
        raise CorruptModelError(folder / CHECKPOINT, 0, f"no checkpoint of such a training, but of another kind "
                                                        f"({error}); choose another folder") from error


def step_rows(rows: range, training: TrainingConfig, step: int) -> list[int]:
    """The rows of a step: each epoch is a permutation of all, a function of the seed and its number."""
    if not rows:
        raise InvalidRequestError("text", 0, "long enough for a row to train on")
    found: list[int] = []
    at = step * training.rows_per_step
    while len(found) < training.rows_per_step:
        epoch, first = divmod(at, len(rows))
        order = np.random.default_rng([training.seed, epoch]).permutation(len(rows))
        taken = order[first : first + training.rows_per_step - len(found)]
        found += [rows[int(i)] for i in taken]
        at += len(taken)
    return found


def rate_share(training: TrainingConfig, step: int) -> float:
    """Linear warmup, then a cosine to zero."""
    warm = training.warmup * training.steps
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1.0, training.steps - warm)))


def _device(name: str) -> torch.device:
    """DeviceError where torch does not know it, or this machine does not have it."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" would make tensors, and no values
    except (RuntimeError, AssertionError) as error:  # torch raises the second where it was built without CUDA
        raise DeviceError(f"training.device={name!r}: {str(error).splitlines()[0]}") from error
    return device


def _optimizer(network: Network, t: TrainingConfig) -> torch.optim.Optimizer:
    matrices = [p for n, p in network.named_parameters() if p.ndim == 2 and n not in ("embedding", "head")]
    others = [p for n, p in network.named_parameters() if p.ndim != 2 or n in ("embedding", "head")]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": t.weight_decay}, {"params": others}],
                             lr=t.learning_rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)


def resumable(config: DistillConfig) -> dict[str, Any]:
    """The part of a config that decides how a training goes."""
    values = json.loads(json.dumps(asdict(config)))
    for name in ("save_every", "threads", "device"):
        values["training"].pop(name)
    for name in ("export", "recipe", "stage", "cache", "curve"):
        values.pop(name)
    # Text and teacher are known by their fingerprints: they may move.
    values["text"].pop("files")
    values.pop("teacher")
    return values


def _same_config(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    for table, values in now.items():
        for key, value in values.items():
            if before.get(table, {}).get(key) != value:
                raise InvalidRequestError(f"{table}.{key}", value, f"{before.get(table, {}).get(key)!r}, as in the "
                                          f"training that {folder} holds; another one needs another folder")
