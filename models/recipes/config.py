"""What the bundled model is: its shape, its data and its training, in one dataclass."""
from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edge_runtime.errors import InvalidRequestError
from edge_runtime.models.rope import RopeConfig


@dataclass(frozen=True)
class NetworkConfig:
    """Shape of a decoder; the defaults are the bundled model's, whose widths are multiples of 256, so that every GGUF
    block format fits.

    rope: scaled positions of a model made elsewhere, before rope_theta; None: plain ones. rope_factors: divisors of its
    frequencies [head_size / 2], or empty.
    """

    vocab_size: int = 4096
    width: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    ffn: int = 768
    context_length: int = 2048
    rope_theta: float = 100000.0
    rms_eps: float = 1e-5
    plant: bool = True  # see planting.py
    architecture: str = "llama"
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = True
    rope: RopeConfig | None = None
    rope_factors: tuple[float, ...] = ()

    @property
    def parameters(self) -> int:
        attention = self.width * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        bias = (self.heads + 2 * self.kv_heads) * self.head_size if self.qkv_bias else 0
        norms = 2 * self.width + (2 * self.head_size if self.qk_norm else 0)
        block = attention + bias + 3 * self.width * self.ffn + norms
        tables = 1 if self.tied_head else 2
        return tables * self.vocab_size * self.width + self.layers * block + self.width


def network_from_json(values: Mapping[str, Any]) -> NetworkConfig:
    """The inverse of `dataclasses.asdict` and JSON."""
    rope = values.get("rope")
    return NetworkConfig(**{**values, "rope": RopeConfig(**rope) if rope else None,
                            "rope_factors": tuple(values.get("rope_factors", ()))})


@dataclass(frozen=True)
class RecipeConfig:
    """The whole recipe. Everything that the weights depend on is here; `--seed` and the steps are the usual knobs.

    row_lengths: (tokens per row, weight) of the batches; a batch has rows of one length and batch_tokens tokens. A step
    averages the gradients of batches_per_step batches.
    loss_share: share of a batch's positions that get a loss: all of the answers first, then random ones of the rest,
    which count context_weight.
    rate_points: (step, share of the full rates), straight lines in between.
    start: training folder, beside this one, whose network this one grows from (`growing.grow`); "": from nothing.
    teacher: training folder beside this one whose distribution is learned; "": none. The loss is then teacher_share of
    the divergence from the teacher at `temperature`, hidden_share of the distance from its last hidden states, and the
    cross-entropy for the rest.
    exits: numbers of layers after which the network can be left. Every batch also counts the loss of one of them, in
    rotation, exit_scale times. exit_curriculum: they join from the last to the first over the first half of the
    training, else all count from the start.
    layer_dropout: how often a batch leaves out the last layer; earlier ones less (`losses.dropout_rates`).
    quantize, quantize_head: GGUF types whose rounding the forward pass sees; "": none.
    """

    network: NetworkConfig = field(default_factory=NetworkConfig)
    seed: int = 2026
    tokenizer_documents: int = 12_000
    steps: int = 3300
    batch_tokens: int = 2048
    batches_per_step: int = 3
    row_lengths: tuple[tuple[int, float], ...] = ((256, 0.62), (512, 0.33), (2048, 0.05))
    loss_share: float = 0.45
    context_weight: float = 0.3
    matrix_rate: float = 0.012
    vector_rate: float = 3e-3
    weight_decay: float = 0.01
    momentum: float = 0.95
    rate_points: tuple[tuple[int, float], ...] = ((0, 1 / 60), (59, 1.0), (1650, 1.0), (3300, 0.0))
    start: str = ""
    teacher: str = ""
    temperature: float = 1.0
    teacher_share: float = 0.7
    hidden_share: float = 0.0
    exits: tuple[int, ...] = ()
    exit_scale: float = 0.3
    exit_curriculum: bool = True
    layer_dropout: float = 0.0
    quantize: str = ""
    quantize_head: str = "Q8_0"

    def __post_init__(self) -> None:
        layers = self.network.layers
        if list(self.exits) != sorted(set(self.exits)) or any(not 1 <= e < layers for e in self.exits):
            raise InvalidRequestError("exits", list(self.exits),
                                      f"ascending numbers of layers from 1 to {layers - 1} (the network has {layers})")
        for name in ("teacher_share", "hidden_share", "layer_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidRequestError(name, getattr(self, name), "from 0 to 1")
        if self.teacher_share + self.hidden_share > 1:
            raise InvalidRequestError("hidden_share", self.hidden_share,
                                      f"at most {1 - self.teacher_share:g} beside teacher_share={self.teacher_share}")
        if self.temperature <= 0:
            raise InvalidRequestError("temperature", self.temperature, "above 0")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)


def with_steps(config: RecipeConfig, steps: int) -> RecipeConfig:
    """The recipe stretched or shortened to `steps`, its rate points with it."""
    points = tuple((round(step * steps / config.steps), share) for step, share in config.rate_points)
    return config if steps == config.steps else dataclasses.replace(config, steps=steps, rate_points=points)


def recipe_from_json(text: str) -> RecipeConfig:
    """The inverse of `RecipeConfig.to_json`."""
    values = json.loads(text)
    values["network"] = network_from_json(values["network"])
    values["rate_points"] = tuple((int(step), float(share)) for step, share in values["rate_points"])
    values["exits"] = tuple(values.get("exits", ()))
    values["row_lengths"] = tuple((int(length), float(weight)) for length, weight in values["row_lengths"])
    return RecipeConfig(**values)


# Two layers of 64: trains in seconds, for tests.
MINUSCULE = RecipeConfig(
    network=NetworkConfig(vocab_size=512, width=64, layers=2, heads=4, kv_heads=2, head_size=16, ffn=128,
                          context_length=512),
    tokenizer_documents=200, steps=20, batch_tokens=512, batches_per_step=2, row_lengths=((256, 0.5), (512, 0.5)),
    vector_rate=2e-2, rate_points=((0, 0.25), (3, 1.0), (12, 1.0), (20, 0.0)))
