"""One lap of the device through all layers, in each of the modes. All run on the accelerator's thread.

A lap leaves its flows at the last layer (`Flow.layer == layers`), but for those of `overlap` that are still on their
way. See docs/scheduler.md for what each mode is good for.
"""
from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, wait

from edge_runtime.offload.flow import Flow, Processors, segment

STORE_ROWS = 64  # of a batch whose keys and values are not kept until the lap's end


def lockstep(by: Processors, flow: Flow) -> None:
    """Device-only and synchronous: all rows side by side; the host's attend while the device's do, and the slower half
    is waited for in every layer."""
    for _ in range(by.accelerator.layers):
        segment(by, [flow])
        flow.attend()
        flow.join()
        if flow.rows.count > STORE_ROWS:
            flow.store()


def pipelined(by: Processors, one: Flow, two: Flow) -> None:
    """Two halves in turn: one is in the device's linear parts, and in its attention there, while the host attends for
    the other. Weights are read twice."""
    for layer in range(by.accelerator.layers):
        segment(by, [one])
        one.attend()
        if layer:
            two.join()
        segment(by, [two])
        two.attend()
        one.join()
    two.join()


def overlap(by: Processors, device: Flow | None, cohorts: Sequence[Flow], *, drain: bool = False) -> None:
    """The device's rows go on without waiting; each cohort joins the batch of its next layer if its attention is done
    when the device comes by. Something moves in every lap. drain: wait for the cohorts, so that all come to the end."""
    layers, moved = by.accelerator.layers, False
    while not moved:
        for layer in range(layers + 1):
            for cohort in cohorts:
                if cohort.in_flight is not None and cohort.layer == layer - 1 and (drain or cohort.ready):
                    cohort.join()
            members = [cohort for cohort in cohorts if cohort.layer == layer and cohort.in_flight is None]
            if layer < layers and device is not None:
                members.insert(0, device)
            moved = moved or bool(members)
            if layer == layers or not members:
                continue
            segment(by, members)
            if device is not None:
                device.attend()
                device.join()
        if not moved:
            wait([cohort.in_flight for cohort in cohorts if cohort.in_flight is not None],
                 return_when=FIRST_COMPLETED)
