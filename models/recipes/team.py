"""Gradients of a step's batches, computed by worker processes that take batches as they become free.

One OpenMP team over two cores waits at every product for the core that something else is using. Processes of one
thread that pull small batches lose only their share of the busy core.
"""
from __future__ import annotations

import queue
import shutil
from dataclasses import dataclass

import torch
import torch.multiprocessing as mp
from tokenizers import Tokenizer
from torch import Tensor

from .batches import make_batch
from .config import NetworkConfig, RecipeConfig
from .network import Network
from .objective import PARTS, Objective
from .rounding import Rounding


def has_compiler() -> bool:
    return shutil.which("g++") is not None or shutil.which("clang++") is not None


@dataclass(frozen=True)
class Result:
    """What one batch gave: its place in the step, its loss, the loss's parts (`objective.PARTS`), its tokens."""

    slot: int
    loss: float
    parts: dict[str, float]
    tokens: int


def _gradient(objective: Objective, tokenizer: Tokenizer, number: int, slot: int, out: Tensor) -> Result:
    """Writes the flat gradient of batch `number` into `out`."""
    batch = make_batch(objective.config, tokenizer, number)
    objective.network.zero_grad(set_to_none=True)
    loss, parts = objective(batch, number)
    loss.backward()
    # A block that layer dropout left out has no gradient.
    torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
               for p in objective.network.parameters()], out=out)
    return Result(slot, loss.item(), parts, batch.tokens.size - len(batch.tokens))


def _shared(config: NetworkConfig, parameters: list[Tensor]) -> Network:
    network = Network(config)
    for mine, shared in zip(network.parameters(), parameters):
        mine.data = shared
    return network


def _work(config: RecipeConfig, tokenizer_json: str, parameters: list[Tensor], teacher_config: NetworkConfig | None,
          teacher_parameters: list[Tensor], slots: Tensor, compiled: bool, tasks: mp.Queue, results: mp.Queue) -> None:
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_str(tokenizer_json)
    teacher = None if teacher_config is None else _shared(teacher_config, teacher_parameters)
    objective = Objective(config, _shared(config.network, parameters), teacher, compiled)
    parent = mp.parent_process()
    while True:
        try:
            task = tasks.get(timeout=5)
        except queue.Empty:
            if parent is None or parent.is_alive():
                continue
            return  # the trainer was killed
        if task is None:
            return
        number, slot = task
        results.put(_gradient(objective, tokenizer, number, slot, slots[slot]))


class Team:
    """`gradients(step)` sets every parameter's .grad to the mean over the step's batches.

    workers: processes of one thread each; 0: this process does the work. Batches are summed in the order of their
    numbers whoever computed them, so the result does not depend on the workers. rounding: gradients are taken at the
    rounded weights (straight-through).
    """

    def __init__(self, network: Network, config: RecipeConfig, tokenizer: Tokenizer, workers: int = 1,
                 compiled: bool | None = None, teacher: Network | None = None, rounding: Rounding | None = None):
        self.network, self.config, self.tokenizer, self.rounding = network, config, tokenizer, rounding
        compiled = has_compiler() if compiled is None else compiled
        self.computed = network if rounding is None else Network(config.network)
        size = sum(p.numel() for p in network.parameters())
        self.slots = torch.zeros(config.batches_per_step, size)
        self.processes: list = []
        if not workers:
            self.objective = Objective(config, self.computed, teacher, compiled)
            return
        self.slots.share_memory_()
        self.computed.share_memory()
        if teacher is not None:
            teacher.share_memory()
        context = mp.get_context("spawn")
        self.tasks, self.results = context.Queue(), context.Queue()
        arguments = (config, tokenizer.to_str(), [p.data for p in self.computed.parameters()],
                     None if teacher is None else teacher.config,
                     [] if teacher is None else [p.data for p in teacher.parameters()],
                     self.slots, compiled, self.tasks, self.results)
        self.processes = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(workers)]
        for process in self.processes:
            process.start()

    @torch.no_grad()
    def _round(self) -> None:
        assert self.rounding is not None
        for (name, value), computed in zip(self.network.named_parameters(), self.computed.parameters()):
            computed.copy_(self.rounding(name, value))

    def gradients(self, step: int) -> tuple[float, dict[str, float], int]:
        """Mean loss of the step, the means of its parts, the number of its tokens."""
        if self.rounding is not None:
            self._round()
        count = self.config.batches_per_step
        numbers = range(step * count, (step + 1) * count)
        if self.processes:
            for slot, number in enumerate(numbers):
                self.tasks.put((number, slot))
            done = sorted((self._result() for _ in numbers), key=lambda result: result.slot)
        else:
            done = [_gradient(self.objective, self.tokenizer, number, slot, self.slots[slot])
                    for slot, number in enumerate(numbers)]
        mean = self.slots.mean(0)
        at = 0
        for parameter in self.network.parameters():
            parameter.grad = mean[at : at + parameter.numel()].view_as(parameter)
            at += parameter.numel()
        parts = {name: sum(result.parts[name] for result in done) / count for name in PARTS}
        return sum(result.loss for result in done) / count, parts, sum(result.tokens for result in done)

    def _result(self) -> Result:
        """The next finished batch. RuntimeError where a worker died instead of answering."""
        while True:
            try:
                return self.results.get(timeout=10)
            except queue.Empty:
                if not all(process.is_alive() for process in self.processes):
                    raise RuntimeError("a training worker ended; run again with --resume") from None

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        for _ in self.processes:
            self.tasks.put(None)
        for process in self.processes:
            process.join(timeout=10)
            if process.is_alive():
                process.terminate()
