"""The trainings that the bundled model is made of, each a recipe, in the order in which they run.

base: 6 layers from nothing. teacher: grown from it to 12 wider layers. stem: grown from it to the student's 10 layers,
and its exits taught. student: the stem, learning from the teacher; control: the same batches without the teacher.
bundled: the student under the rounding of its file.
"""
from __future__ import annotations

import dataclasses

from .config import NetworkConfig, RecipeConfig

EXITS = (2, 3, 4, 6, 8)
_ROWS = ((256, 0.4), (512, 0.3), (768, 0.25), (1536, 0.05))

BASE = RecipeConfig()
TEACHER = RecipeConfig(
    network=NetworkConfig(layers=12, ffn=1280), seed=3001, steps=850, start="base", batch_tokens=1536,
    batches_per_step=4, row_lengths=_ROWS, rate_points=((0, 0.02), (30, 0.6), (350, 0.6), (850, 0.0)))
STEM = dataclasses.replace(
    TEACHER, network=NetworkConfig(layers=10), seed=3002, steps=240, exits=EXITS, exit_scale=0.4, layer_dropout=0.1,
    rate_points=((0, 0.02), (30, 0.6), (240, 0.6)))
STUDENT = dataclasses.replace(
    STEM, seed=3003, steps=320, start="stem", teacher="teacher", teacher_share=0.8, exit_curriculum=False,
    rate_points=((0, 0.06), (20, 0.6), (60, 0.6), (320, 0.0)))
CONTROL = dataclasses.replace(STUDENT, teacher="")
BUNDLED = dataclasses.replace(
    STUDENT, seed=3004, steps=40, start="student", layer_dropout=0.0, quantize="Q4_0", quantize_head="Q8_0",
    rate_points=((0, 0.005), (8, 0.08), (40, 0.0)))


# By the name of their folders, in the order in which they run; the last one is the file's.
STAGES: dict[str, RecipeConfig] = {"base": BASE, "teacher": TEACHER, "stem": STEM, "student": STUDENT,
                                   "control": CONTROL, "bundled": BUNDLED}
