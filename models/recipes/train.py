"""Trains a network in bf16 on the CPU: `python -m edge_runtime.models.recipes.train --out FOLDER [--resume]`.

The folder holds recipe.json, tokenizer.json, checkpoint.safetensors (replaced atomically), log.jsonl, and scales.
safetensors where training rounds to a block format. A run killed at any moment and resumed gives the losses that an
unbroken run gives, because a batch is a function of its number and the checkpoint holds weights and both optimizers.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import sys
import time

import torch
from tokenizers import Tokenizer

from .batches import make_batch
from .bpe import train_tokenizer
from .checkpoint import cut_log, load_checkpoint, restore_training, save_checkpoint, training_tensors, weights_of
from .config import MINUSCULE, RecipeConfig, recipe_from_json, with_steps
from .growing import grow
from .network import Network
from .optimizer import make_optimizers, schedule
from .rounding import Rounding, input_squares
from .team import Team

CHECKPOINT, SCALES = "checkpoint.safetensors", "scales.safetensors"
IMPORTANCE_BATCHES = 8


def load_network(folder: pathlib.Path) -> tuple[RecipeConfig, Tokenizer, Network]:
    """The recipe, tokenizer and float32 network that a training folder holds."""
    config = recipe_from_json((folder / "recipe.json").read_text())
    network = Network(config.network)
    network.load_state_dict(weights_of(load_checkpoint(folder / CHECKPOINT)[0]))
    return config, Tokenizer.from_file(str(folder / "tokenizer.json")), network.eval()


def _begin(config: RecipeConfig, folder: pathlib.Path) -> tuple[Tokenizer, Network]:
    """Tokenizer and first weights: drawn, or grown from the folder that the recipe names."""
    if not config.start:
        tokenizer = train_tokenizer(config)
        tokenizer.save(str(folder / "tokenizer.json"))
        return tokenizer, Network(config.network, config.seed)
    _, tokenizer, small = load_network(folder.parent / config.start)
    shutil.copyfile(folder.parent / config.start / "tokenizer.json", folder / "tokenizer.json")
    return tokenizer, grow(small, config.network, config.seed)


def importance(network: Network, config: RecipeConfig, tokenizer: Tokenizer) -> dict:
    """`rounding.input_squares` over the recipe's first batches."""
    return input_squares(network, [torch.from_numpy(make_batch(config, tokenizer, number).tokens[:, :-1])
                                   for number in range(IMPORTANCE_BATCHES)])


def _rounding(config: RecipeConfig, folder: pathlib.Path, network: Network, tokenizer: Tokenizer) -> Rounding | None:
    """The scales of the folder, searched for the network's first weights where there are none."""
    if not config.quantize:
        return None
    path = folder / SCALES
    if not path.exists():
        found = Rounding.search(network, config.quantize, config.quantize_head, importance(network, config, tokenizer))
        partial = path.with_suffix(".partial")
        found.save(partial)
        os.replace(partial, path)
    return Rounding.load(path)


def train(config: RecipeConfig, folder: pathlib.Path, resume: bool = False, save_every: float = 120.0,
          workers: int = 1, compiled: bool | None = None) -> Network:
    """Trains to config.steps and returns the network. save_every: seconds between checkpoints (0: after every step).
    workers: see `team.Team`. compiled: fuse with torch.compile (1.6 times as fast, needs a C++ compiler); None: where
    a compiler is found. OSError where the last checkpoint cannot be written; a full disk before that is reported and
    the older checkpoint stays."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = folder / CHECKPOINT, folder / "log.jsonl"
    torch.manual_seed(config.seed)
    start, before = 0, 0.0
    if resume and checkpoint.exists():
        tokenizer, network = Tokenizer.from_file(str(folder / "tokenizer.json")), Network(config.network, config.seed)
        optimizers = make_optimizers(network, config)
        tensors, state = load_checkpoint(checkpoint)
        restore_training(network, optimizers, tensors)
        start, before = state["step"], state["seconds"]
        cut_log(log, start)
    else:
        (folder / SCALES).unlink(missing_ok=True)
        tokenizer, network = _begin(config, folder)
        optimizers = make_optimizers(network, config)
        log.unlink(missing_ok=True)
    rounding = _rounding(config, folder, network, tokenizer)
    (folder / "recipe.json").write_text(config.to_json())
    if start >= config.steps:
        return network.eval()
    teacher = load_network(folder.parent / config.teacher)[2].requires_grad_(False) if config.teacher else None
    began = saved_at = time.monotonic()
    with Team(network, config, tokenizer, workers, compiled, teacher, rounding) as team:
        for step in range(start, config.steps):
            step_began = time.monotonic()
            loss, parts, tokens = team.gradients(step)
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * schedule(config, step)
                optimizer.step()
            now = time.monotonic()
            entry = {"step": step, "loss": round(loss, 6), **{name: round(value, 6) for name, value in parts.items()},
                     "norm": round(norm.item(), 4), "tokens": tokens,
                     "tokens_per_second": round(tokens / (now - step_began)), "seconds": round(before + now - began, 1)}
            with log.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            last = step + 1 == config.steps
            if now - saved_at >= save_every or last:
                _save(checkpoint, network, optimizers, step + 1, before + now - began, last)
                saved_at = now
            _progress(folder.name, step + 1, config.steps, loss, (now - began) / (step + 1 - start))
    return network.eval()


def _save(path: pathlib.Path, network: Network, optimizers: list[torch.optim.Optimizer], step: int, seconds: float,
          last: bool) -> None:
    try:
        save_checkpoint(path, training_tensors(network, optimizers), {"step": step, "seconds": seconds})
    except OSError as error:
        if last:
            raise
        kept = "the one before it stays" if path.exists() else "there is none yet"
        print(f"\nthe checkpoint after step {step} was not written ({error}); {kept}, training goes on",
              file=sys.stderr, flush=True)


def _progress(name: str, done: int, steps: int, loss: float, per_step: float) -> None:
    """A line that rewrites itself on a terminal, one line in fifty steps elsewhere."""
    live = sys.stderr.isatty()
    if live or done % 50 == 0 or done == steps:
        left = (steps - done) * per_step
        print(f"{name}: step {done} of {steps}, loss {loss:.4f}, {left / 60:.1f} minutes left",
              end="\r" if live and done < steps else "\n", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="training folder")
    parser.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint")
    parser.add_argument("--recipe", type=pathlib.Path, help="recipe.json (default: the first stage of the bundle)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: the recipe's)")
    parser.add_argument("--seed", type=int, help="seed of the data and the weights")
    parser.add_argument("--save-every", type=float, default=120.0, help="seconds between checkpoints")
    parser.add_argument("--minuscule", action="store_true", help="the test configuration")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    options = parser.parse_args()
    config = MINUSCULE if options.minuscule else RecipeConfig()
    if options.recipe:
        config = recipe_from_json(options.recipe.read_text())
    if options.seed is not None:
        config = dataclasses.replace(config, seed=options.seed)
    config = with_steps(config, config.steps if options.steps is None else options.steps)
    train(config, options.out, options.resume, options.save_every, options.workers, False if options.eager else None)


if __name__ == "__main__":
    main()
