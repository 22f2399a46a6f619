"""The fake device with exits: at an exit it draws the full model's token, or another one, with a confidence that says
how likely the other one is. Whatever is promised of thresholds can be checked against the truth."""
from __future__ import annotations

from hashlib import blake2b

import numpy as np

from edge_runtime.chat_template import ChatTemplate
from edge_runtime.devices.base import Step, StepResult
from edge_runtime.exit_trace import confidences
from edge_runtime.llm import LLM
from edge_runtime.loading import LoadedModel
from tests.fake_device import FakeDevice, byte_tokenizer

TEMPLATE = ChatTemplate("{% for m in messages %}{{ m.content }}\n{% endfor %}")


class ExitDevice(FakeDevice):
    """exits: as `Device.exit_layers`, of 8 layers. hardness: exit -> how often its token is another's."""

    def __init__(self, exits: tuple[int, ...] = (2, 4), hardness: dict[int, float] | None = None, **options):
        super().__init__(**options)
        self.exit_layers = exits
        self.hardness = hardness or {layer: 0.5 / layer for layer in exits}
        self.layers_run = 0
        self._layout()

    def _layout(self) -> None:
        from edge_runtime.devices.base import KVLayout

        self.kv_layout = KVLayout(layers=8, kv_heads=1, head_size=16)

    def at_exit(self, history: np.ndarray, layer: int) -> np.ndarray:
        """float32 [V]: wrong with probability c * hardness, where 1 - c is about the confidence."""
        full = self.logits(history)
        digest = blake2b(np.ascontiguousarray(history, "<i4").tobytes() + bytes([layer]), digest_size=16).digest()
        rng = np.random.default_rng(int.from_bytes(digest, "little"))
        doubt, luck, other = rng.random(), rng.random(), int(rng.integers(32, 122))
        out = np.full_like(full, -20.0)
        best = int(full.argmax())
        out[other if luck < 2 * doubt * self.hardness[layer] else best] = 6 - 8 * doubt
        out[[65, 66, 67]] = np.maximum(out[[65, 66, 67]], -3.0)
        return out

    def run(self, step: Step) -> StepResult:
        found = super().run(step)
        if not any(part.exit for part in step.slices):
            return found
        logits, exits = found.logits.copy(), np.full(len(found.logits), 8, np.int32)
        row = 0
        for part in step.slices:
            count = {"all": len(part.token_ids), "last": 1, "none": 0}[part.logits]
            end = part.position + len(part.token_ids)
            if part.exit is not None:
                assert not part.prompt
                history = self._history(part)
                for i in range(count):
                    seen = history[:end - count + 1 + i]
                    for layer, limit in zip(self.exit_layers, part.exit.limits):
                        mine = self.at_exit(seen, layer)
                        value = np.inf if part.exit.criterion == "layer" and limit == -np.inf else (
                            confidences(mine[None])[part.exit.criterion][0] if part.exit.criterion != "layer" else -1)
                        if value >= limit:
                            logits[row + i], exits[row + i] = mine, layer
                            break
            row += count
        return StepResult(logits, found.hidden, exits)


def exit_llm(device: ExitDevice | None = None, *, context: int = 512, fingerprint: str = "exit-device") -> LLM:
    device = device or ExitDevice(end_every=24)
    return LLM.from_loaded(LoadedModel(
        device, byte_tokenizer(), context, 4000 * device.kv_layout.page_bytes,  # type: ignore[arg-type]
        chat_template=TEMPLATE, fingerprint=lambda: fingerprint))
