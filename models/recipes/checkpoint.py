"""Checkpoints in safetensors: tensors by name and one JSON value, replaced as a whole or not at all."""
from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from edge_runtime.errors import CorruptModelError

_STATE = "edge_runtime"  # key of the JSON value in the file's metadata


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: Any) -> None:
    """Writes beside and renames, so that a kill or a full disk leaves the old checkpoint or the new one. state: what
    JSON holds. OSError, with nothing left behind, where it cannot be written."""
    partial = path.with_name(path.name + ".partial")
    blob = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()},
                {_STATE: json.dumps(state)})
    try:
        with open(partial, "wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], Any]:
    """What `save_checkpoint` was given. CorruptModelError for a file that is none."""
    try:
        with safe_open(str(path), "pt") as file:
            state = json.loads((file.metadata() or {})[_STATE])
            return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise CorruptModelError(path, 0, f"no checkpoint of a training ({error})") from error


def cut_log(log: Path, steps: int) -> None:
    """Keeps the lines of the first steps: what came after a checkpoint is run again. A full disk leaves all lines."""
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    if len(lines) > steps:
        with open(log, "r+b") as file:
            file.truncate(sum(map(len, lines[:steps])))


def training_tensors(network: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The weights, and the optimizers' state by the names of the parameters it belongs to."""
    tensors = {f"weights.{name}": value for name, value in network.state_dict().items()}
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                tensors[f"optimizer.{number}.{key}.{names[id(parameter)]}"] = torch.as_tensor(value)
    return tensors


def restore_training(network: nn.Module, optimizers: list[torch.optim.Optimizer],
                     tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `training_tensors`: a step after it does what it would have done before."""
    prefix = "weights."
    network.load_state_dict({name[len(prefix):]: t for name, t in tensors.items() if name.startswith(prefix)})
    parameters = dict(network.named_parameters())
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, number, key, parameter = name.split(".", 3)
            target = parameters[parameter]
            value = value.clone() if value.ndim == 0 else value.to(target.device).clone()
            optimizers[int(number)].state[target][key] = value


def weights_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's state of a checkpoint's tensors."""
    return {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
