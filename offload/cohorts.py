"""Rows of overlap laps that are on their way: cohorts that attend on the host, each waiting at a layer of its own."""
from __future__ import annotations

from collections.abc import Sequence

from edge_runtime.devices.base import PAGE_TOKENS, SequenceSlice
from edge_runtime.offload.flow import Flow
from edge_runtime.offload.step_rows import is_prompt


class Cohorts:
    """By the sequences' keys. All methods run on the accelerator's thread."""

    def __init__(self) -> None:
        self._flows: list[Flow] = []
        self._slices: dict[int, tuple[int, int]] = {}  # position, and address of the page that the row writes

    def __len__(self) -> int:
        return len(self._flows)

    def __contains__(self, key: int) -> bool:
        return key in self._slices

    @property
    def rows(self) -> int:
        return len(self._slices)

    @property
    def flows(self) -> tuple[Flow, ...]:
        return tuple(self._flows)

    def layer(self, key: int) -> int:
        """The layer at which a sequence waits, -1 where it is not under way."""
        return next((flow.layer for flow in self._flows if key in flow.rows.keys), -1)

    def start(self, flow: Flow, slices: Sequence[SequenceSlice]) -> None:
        self._flows.append(flow)
        self._slices.update({s.key: _place(s) for s in slices})

    def land(self, layers: int) -> list[Flow]:
        """Those that came to the last layer: they are under way no more."""
        done = [flow for flow in self._flows if flow.layer == layers]
        for flow in done:
            self._leave(flow)
        return done

    def stop(self, key: int) -> None:
        """A sequence ends: its cohort begins anew without it. The others lose the layers they had, and nothing else."""
        for flow in [flow for flow in self._flows if key in flow.rows.keys]:
            self._stop(flow)

    def stop_strays(self, slices: Sequence[SequenceSlice]) -> None:
        """Those of sequences that are elsewhere now: at another token, or in another page (a fork made them copy)."""
        for s in slices:
            if s.key in self and (is_prompt(s) or self._slices[s.key] != _place(s)):
                self.stop(s.key)

    def stop_all(self) -> None:
        """All begin anew with the next lap."""
        for flow in list(self._flows):
            self._stop(flow)

    def _stop(self, flow: Flow) -> None:
        if flow.in_flight is not None:
            flow.in_flight.exception()  # waits: the host must not touch pages that are given back
        self._leave(flow)

    def _leave(self, flow: Flow) -> None:
        self._flows.remove(flow)
        for key in flow.rows.keys:
            self._slices.pop(key, None)


def _place(s: SequenceSlice) -> tuple[int, int]:
    return s.position, int(s.pages[s.position // PAGE_TOKENS])
