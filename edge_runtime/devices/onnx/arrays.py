"""Values in a device's memory, and the memory itself: the host's, or one of its own behind ONNX Runtime."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class DeviceArray:
    """A value in a device's own memory. `shape` may name fewer leading rows than the value has."""

    def __init__(self, value: Any, shape: tuple[int, ...]):
        self.value, self.shape = value, shape

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def address(self) -> int:
        """What IOBinding takes: a pointer, or the device's handle of the buffer."""
        return int(self.value.data_ptr())

    def reshaped(self, *shape: int) -> DeviceArray:
        return DeviceArray(self.value, shape)

    def first(self, rows: int) -> DeviceArray:
        return DeviceArray(self.value, (rows, *self.shape[1:]))


class HostArray:
    """The same for memory that the host shares: a NumPy array."""

    def __init__(self, array: np.ndarray):
        self.array = array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def rows(self) -> int:
        return len(self.array)

    @property
    def address(self) -> int:
        return int(self.array.ctypes.data)

    def reshaped(self, *shape: int) -> HostArray:
        return HostArray(self.array.reshape(shape))

    def first(self, rows: int) -> HostArray:
        return HostArray(self.array[:rows])


Value = DeviceArray | HostArray


def host_arrays(arrays: Sequence[Value]) -> list[np.ndarray]:
    return [a.array for a in arrays if isinstance(a, HostArray)]
