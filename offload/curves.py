"""What the work of one layer takes in seconds, as points that were measured or predicted, and lines between them."""
from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from edge_runtime.errors import ProfileError

Points = tuple[tuple[int, float], ...]
GridPoints = tuple[tuple[int, int, float], ...]

POINTS = ("linear", "head", "upload", "download")
GRIDS = ("device_attention", "host_attention", "device_prompt", "host_prompt")
LARGEST = 1 << 62  # of any figure, in seconds, bytes or rows
SIZES = ("kv_bytes_device", "kv_bytes_host", "q_bytes", "o_bytes")


@dataclass(frozen=True)
class Curves:
    """Seconds of one layer, unless said otherwise; what a profile measured, or a hardware description predicts.

    layers: of the model. linear: (rows, seconds) of one segment. head: (rows, seconds) of embedding, final norm and
    head, once a lap. device_attention, host_attention: (rows, KV tokens per row, seconds) of decoding rows, their own
    KV written. device_prompt, host_prompt: (rows, KV tokens before them, seconds) of a piece of one prompt. upload,
    download: (bytes, seconds). handover: what the way to the host's thread and back costs a layer, besides the copies.
    kv_bytes_device, kv_bytes_host: KV per token, all layers. q_bytes, o_bytes: per row and layer, to the host and back.
    contention_device, contention_host: how many times as long work takes while the other processor works too.
    bring: (KV tokens, seconds) from the host's pages into the device's KV, unpacked on the way; where it is empty,
    `upload` counts alone.

    Raises ProfileError where a figure is missing, negative or not finite.
    """

    layers: int
    linear: Points
    head: Points
    device_attention: GridPoints
    host_attention: GridPoints
    device_prompt: GridPoints
    host_prompt: GridPoints
    upload: Points
    download: Points
    handover: float
    kv_bytes_device: int
    kv_bytes_host: int
    q_bytes: int
    o_bytes: int
    contention_device: float = 1.0
    contention_host: float = 1.0
    bring: Points = ()

    def __post_init__(self) -> None:
        _check(_whole(self.layers) and self.layers > 0, "layers", self.layers, "a whole number of 1 or more")
        for name in SIZES:
            _check(_whole(getattr(self, name)) and getattr(self, name) > 0, name, getattr(self, name), "1 byte or more")
        _check(_seconds(self.handover), "handover", self.handover, "seconds, 0 or more")
        for name in ("contention_device", "contention_host"):
            factor = getattr(self, name)
            _check(_seconds(factor) and factor >= 1, name, factor, "1 or more")
        for name in (*POINTS, *GRIDS, "bring"):
            if name == "bring" and not self.bring:
                object.__setattr__(self, name, ())
                continue
            object.__setattr__(self, name, _points(name, getattr(self, name), 3 if name in GRIDS else 2))

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Curves:
        """Raises ProfileError, which names the field that is not as it must be."""
        if not isinstance(value, Mapping):
            raise ProfileError("curves", "not a JSON object")
        known = {field.name for field in fields(cls)}
        missing = sorted(known - set(value) - {"bring"})
        if missing:
            raise ProfileError("curves", f"{', '.join(missing)} missing")
        return cls(**{name: value[name] for name in known & set(value)})


def _points(name: str, points: Any, width: int) -> tuple[tuple, ...]:
    """Sorted, and each place once."""
    _check(isinstance(points, list | tuple) and len(points) > 0, name, points, "a list of one point or more")
    for point in points:
        _check(isinstance(point, list | tuple) and len(point) == width, name, point, f"points of {width} numbers")
        *place, seconds = point
        _check(all(_whole(x) and x >= 0 for x in place) and place[0] > 0, name, point,
               "points at whole numbers, the first of them above 0")
        _check(_seconds(seconds), name, point, "points whose last number is seconds, 0 or more")
    found = tuple(sorted((*(int(x) for x in point[:-1]), float(point[-1])) for point in points))
    _check(len({point[:-1] for point in found}) == len(found), name, found, "points that differ in place")
    return found


def _check(right: bool, name: str, value: object, limit: str) -> None:
    if not right:
        shown = repr(value)
        raise ProfileError(name, f"{shown if len(shown) < 80 else shown[:77] + '...'}: must be {limit}")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST


def _seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < LARGEST


class Line:
    """Straight lines between points, as numpy.interp. Beyond the last point the last line goes on, not downward. Below
    the first one the first line goes on, between 0 and the first value; or, with `through_zero`, a line from 0 at 0."""

    def __init__(self, points: Sequence[tuple[float, float]], through_zero: bool = False):
        self._x = [float(x) for x, _ in points]
        self._y = [float(y) for _, y in points]
        if through_zero and self._x[0] > 0:
            self._x.insert(0, 0.0)
            self._y.insert(0, 0.0)

    def __call__(self, x: float) -> float:
        xs, ys = self._x, self._y
        if len(xs) == 1:
            return ys[0] if x <= xs[0] or not xs[0] else ys[0] * x / xs[0]
        i = min(max(bisect_right(xs, x), 1), len(xs) - 1)
        y = ys[i - 1] + (ys[i] - ys[i - 1]) * ((x - xs[i - 1]) / (xs[i] - xs[i - 1]))
        if x > xs[-1]:
            return max(y, ys[-1])
        return min(max(y, 0.0), ys[0]) if x < xs[0] else y


class Grid:
    """Seconds at (rows, tokens): along the tokens for the neighbouring rows that were measured, then along the rows,
    through 0 at no rows. The rows need not share their places on the tokens' axis; those with a single one grow with
    the tokens as the rows before them, times their number."""

    def __init__(self, points: GridPoints):
        places: dict[int, list[tuple[float, float]]] = {}
        for rows, tokens, seconds in points:
            places.setdefault(rows, []).append((tokens, seconds))
        self._rows = [0.0, *(float(rows) for rows in places)]
        self._lines: list[Line] = []
        many: tuple[int, list[tuple[float, float]]] | None = None
        for rows, line in places.items():
            if len(line) > 1:
                many = rows, line
            elif many is not None:
                (at, seconds), known = line[0], Line(many[1])
                line = [(x, max(seconds + (y - known(at)) * rows / many[0], 0.0)) for x, y in many[1]]
            self._lines.append(Line(line))

    def __call__(self, rows: float, tokens: float) -> float:
        if rows <= 0:
            return 0.0
        i = min(bisect_right(self._rows, rows), len(self._rows) - 1)
        low, high = self._rows[i - 1], self._rows[i]
        below = self._lines[i - 2](tokens) if i > 1 else 0.0
        above = self._lines[i - 1](tokens)
        seconds = below + (above - below) * (rows - low) / (high - low)
        return max(seconds, above) if rows > high else seconds
