"""What leaves early, and what that costs, on documents that calibration never saw; and what the training recorded."""
from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime import calibration, calibration_corpus, calibration_text
from edge_runtime.calibration import Calibration, Measured, Promise
from edge_runtime.exit_trace import Decoded, Replay
from edge_runtime.llm import LLM
from edge_runtime.models import bundled


def recorded() -> dict[str, Any]:
    """The figures that the recipes wrote beside the bundled model; empty where there are none."""
    path = Path(bundled.__file__).with_name("figures.json")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def recorded_value(figures: dict[str, Any], what: str) -> float | None:
    for row in figures.get("rows", []):
        if row.get("what") == what:
            return float(row["value"])
    return None


def replies(llm: LLM, count: int, seed: int) -> list[Decoded]:
    """The full model's replies to prompts about held-out documents."""
    return calibration_text.replies(llm, list(enumerate(calibration_corpus.prompts(count, seed))))


@dataclass(frozen=True)
class Held:
    """A calibration and what it does on other documents."""

    calibration: Calibration
    measured: Measured
    how: str


def calibrated(llm: LLM, risk: float, calibrate_on: int, judge_on: int) -> Held:
    """Of the criteria that are calibrated at this risk, the one whose calibration leaves earliest; where none is
    stored, all are calibrated now. Judged on documents of another seed."""
    name = llm._loaded.fingerprint()
    found = [c for c in (calibration.find(name, criterion) for criterion in calibration.CALIBRATED_CRITERIA)
             if c is not None and c.risk == risk and set(c.thresholds) <= set(llm.exit_layers)]
    how = "as shipped or stored"
    if not found:
        decoded = replies(llm, calibrate_on, calibration_corpus.SEED)
        trace = Replay(llm).trace(decoded)
        made = []
        for criterion in calibration.CALIBRATED_CRITERIA:
            try:
                made.append(calibration.calibrate(llm, decoded, Promise(risk, criterion=criterion), trace=trace))
            except calibration.CalibrationError as error:
                reason = error
        if not made:
            raise reason
        found, how = [one.calibration for one in made], f"calibrated now on {len(decoded)} replies"
    best = min(found, key=lambda one: one.layers_per_token)
    limits = tuple(best.thresholds.get(layer, math.inf) for layer in llm.exit_layers)
    judged = calibration.measure(llm, replies(llm, judge_on, calibration_corpus.JUDGED_SEED), limits, best.criterion)
    return Held(best, judged, how)
