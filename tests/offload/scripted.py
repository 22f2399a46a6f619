"""A scheduler that does what a test says, in place of Apex."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

from edge_runtime.offload.choices import Choice, Mode, Row


class Scripted:
    """mode: of every lap, or a function of the lap's number. host: which keys attend on the host. split: leading tokens
    of host rows that the device attends over."""

    def __init__(self, mode: Mode | Callable[[int], Mode], host: Callable[[int], bool] = lambda key: key % 2 == 0,
                 split: int = 0):
        self.mode, self.host, self.split = mode, host, split
        self.cost = SimpleNamespace(error=0.0)
        self.choices: list[Choice] = []
        self.seconds: list[float] = []

    def choose(self, rows: Sequence[Row], pool_tokens: int) -> Choice:
        mode = self.mode if isinstance(self.mode, Mode) else self.mode(len(self.choices))
        flying = [row.key for row in rows if row.flying >= 0]
        device = [row.key for row in rows if row.ready and not self.host(row.key) and row.key not in flying]
        host = [row.key for row in rows if row.key not in device]
        bring = tuple(row.key for row in rows if not self.host(row.key) and not row.ready)
        if mode is Mode.DEVICE_ONLY and device and not flying:
            found = Choice(mode, device=tuple(device), waiting=tuple(host), bring=bring)
        elif self.split and mode is Mode.SYNCHRONOUS:
            far = {row.key: self.split for row in rows if row.key in host and row.device_tokens >= self.split}
            found = Choice(mode, device=tuple(device), host=tuple(key for key in host if key not in far), split=far,
                           bring=tuple(row.key for row in rows if row.device_tokens < self.split < row.tokens),
                           wanted={row.key: self.split for row in rows})
        else:
            found = Choice(mode, device=tuple(device), host=tuple(host), first=tuple(host[:len(host) // 2]),
                           bring=bring)
        self.choices.append(found)
        return found

    def measured(self, choice: Choice, seconds: float, tokens: int) -> None:
        self.seconds.append(seconds)


HOST, DEVICE = "host", "device"
Place = str | int  # HOST, DEVICE, or the leading tokens that the device attends over


class Placed:
    """Every row exactly where a test says, token by token: until its KV is there, it waits.

    where(key, tokens): of the row that attends over `tokens` tokens. mode: of every lap, or a function of its number.
    """

    def __init__(self, mode: Mode | Callable[[int], Mode], where: Callable[[int, int], Place]):
        self.mode, self.where = mode, where
        self.cost = SimpleNamespace(error=0.0)
        self.laps = 0
        self.ran: dict[str, int] = {HOST: 0, DEVICE: 0, "split": 0}

    def choose(self, rows: Sequence[Row], pool_tokens: int) -> Choice:
        mode = self.mode if isinstance(self.mode, Mode) else self.mode(self.laps)
        self.laps += 1
        place = {row.key: self.where(row.key, row.tokens) for row in rows}
        device = tuple(row.key for row in rows if place[row.key] == DEVICE and row.ready and row.flying < 0)
        split = {row.key: int(at) for row in rows for at in [place[row.key]] if not isinstance(at, str) and
                 row.device_tokens >= at and row.flying < 0}
        host = tuple(row.key for row in rows if place[row.key] == HOST or row.flying >= 0)
        running = {*device, *host, *split}
        bring = tuple(row.key for row in rows if row.key not in running)
        for name, keys in ((HOST, host), (DEVICE, device), ("split", split)):
            self.ran[name] += len(keys)
        return Choice(mode, device=device, host=host, split=split, waiting=bring, bring=bring,
                      first=host[:len(host) // 2], wanted={key: int(at) for key, at in place.items()
                                                           if not isinstance(at, str)},
                      evict=tuple(row.key for row in rows if place[row.key] == HOST and row.device_tokens))

    def measured(self, choice: Choice, seconds: float, tokens: int) -> None:
        pass
