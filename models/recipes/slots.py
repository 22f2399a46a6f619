"""Slot values of the synthetic corpus: who, where, when, how much. Every maker draws from one random generator."""
from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from .tables import (
    FIRST,
    LAST,
    MONTHS,
    NAME_ENDS,
    NUMBER_WORDS,
    STEMS,
    SYLLABLES,
    TABLES,
    TOWN_ENDS,
    UNITS,
    WEEKDAYS,
)

HELD_OUT_SHARE = 10  # one name in ten is never used in training


def is_held_out(name: str) -> bool:
    """Whether a last name, town or firm name is kept from training: a fixed tenth of all names, chosen by checksum."""
    return zlib.crc32(name.encode()) % HELD_OUT_SHARE == 0


@dataclass(frozen=True)
class Names:
    """Draws proper names. held_out False: never a reserved name; True: only reserved names; None: any."""

    rng: random.Random
    held_out: bool | None

    def _admit(self, make: Callable[[], str]) -> str:
        while True:
            name = make()
            if self.held_out is None or is_held_out(name) == self.held_out:
                return name

    def last(self) -> str:
        return self._admit(self._last)

    def _last(self) -> str:
        r = self.rng.random()
        if r < 0.35:
            return self.rng.choice(LAST)
        if r < 0.75:
            return self.rng.choice(STEMS) + self.rng.choice(NAME_ENDS)
        return self.invented()

    def invented(self) -> str:
        return "".join(self.rng.choice(SYLLABLES) for _ in range(self.rng.randint(2, 3))).capitalize()

    def town(self) -> str:
        return self._admit(self._town)

    def _town(self) -> str:
        r = self.rng.random()
        name = self.invented() if r < 0.2 else self.rng.choice(STEMS) + self.rng.choice(TOWN_ENDS)
        r = self.rng.random()
        if r < 0.08:
            return f"{self.rng.choice(('North', 'South', 'East', 'West', 'Port', 'New', 'Upper', 'Lower'))} {name}"
        if r < 0.14:
            return f"{name} {self.rng.choice(('Bay', 'Falls', 'Heath', 'Island', 'Springs', 'Cross'))}"
        return name

    def stem(self) -> str:
        return self._admit(lambda: self.invented() if self.rng.random() < 0.5 else self._last())


def number(rng: random.Random) -> str:
    digits = rng.choice((1, 2, 2, 3, 3, 4))
    value = rng.randint(max(3, 10 ** (digits - 1)), 10**digits - 1)
    return f"{value:,}" if value >= 1000 and rng.random() < 0.6 else str(value)


def money(rng: random.Random) -> str:
    digits = rng.choice((2, 3, 3, 4, 4, 5, 6))
    value = rng.randint(10 ** (digits - 1), 10**digits - 1)
    if digits > 3 and rng.random() < 0.7:
        value -= value % rng.choice((10, 50, 100, 500))
    text = f"{value:,}" if value >= 1000 else str(value)
    if digits <= 3 and rng.random() < 0.2:
        text += f".{rng.randint(1, 99):02d}"
    return rng.choice(("${}", "${}", "{} euros", "{} dollars", "£{}", "€{}", "{} pounds")).format(text)


def date(rng: random.Random) -> str:
    day, month = rng.randint(1, 28), rng.choice(MONTHS)
    style = rng.random()
    if style < 0.4:
        return f"{day} {month}"
    if style < 0.65:
        return f"{month} {day}"
    if style < 0.8:
        return f"{day} {month} {rng.randint(2015, 2032)}"
    if style < 0.9:
        return f"{rng.choice(WEEKDAYS)}, {day} {month}"
    return f"{rng.randint(2015, 2032)}-{rng.randint(1, 12):02d}-{day:02d}"


def clock(rng: random.Random) -> str:
    hour, minute = rng.randint(6, 22), rng.choice((0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55))
    if rng.random() < 0.6:
        return f"{hour:02d}:{minute:02d}"
    half = "a.m" if hour < 12 else "p.m"
    shown = f"{(hour - 1) % 12 + 1}" + (f":{minute:02d}" if minute else "")
    return f"{shown} {half}."


def duration(rng: random.Random, units: tuple[str, ...]) -> str:
    count = rng.choice(NUMBER_WORDS) if rng.random() < 0.55 else str(rng.randint(2, 60))
    return f"{count} {rng.choice(units)}"


def code(rng: random.Random) -> str:
    letters = "".join(rng.choice("ABCDEFGHKLMNPRSTUVWX") for _ in range(rng.randint(1, 3)))
    return f"{letters}-{rng.randint(10, 99999)}"


class Slots:
    """The values of one document. `get("person2.last")` is drawn on first use and kept; two slots of a kind differ."""

    def __init__(self, rng: random.Random, held_out: bool | None = False):
        self.rng, self.names = rng, Names(rng, held_out)
        self.values: dict[str, str] = {}

    def get(self, key: str) -> str:
        name, _, form = key.partition(".")
        if name not in self.values:
            kind = name.rstrip("0123456789")
            taken = {v for k, v in self.values.items() if k.rstrip("0123456789") == kind}
            value = self._make(kind)
            while value in taken:
                value = self._make(kind)
            self.values[name] = value
        value = self.values[name]
        if form:
            return value.split()[0] if form == "first" else value.split()[-1]
        return value

    def _make(self, kind: str) -> str:
        maker = getattr(self, f"_{kind}", None)
        if maker is not None:
            return maker()
        return self.rng.choice(TABLES[kind])

    def _person(self) -> str:
        return f"{self.rng.choice(FIRST)} {self.names.last()}"

    def _sender(self) -> str:
        return self.rng.choice(FIRST) if self.rng.random() < 0.8 else self.names.invented()

    _reader = _sender

    def _town(self) -> str:
        return self.names.town()

    def _site(self) -> str:
        return f"the {self.names.town()} {self.rng.choice(TABLES['site_kind'])}"

    def _org(self) -> str:
        if self.rng.random() < 0.15:
            return f"{self.names.last()} & {self.rng.choice(('Sons', 'Daughters', 'Co', 'Brothers'))}"
        return f"{self.names.stem()} {self.rng.choice(TABLES['org_kind'])}"

    def _farm(self) -> str:
        return f"{self.names.town()} {self.rng.choice(TABLES['farm_kind'])}"

    def _museum(self) -> str:
        return f"the {self.names.town()} {self.rng.choice(TABLES['museum_kind'])}"

    def _hotel(self) -> str:
        return f"the {self.names.stem()} {self.rng.choice(TABLES['hotel_kind'])}"

    def _road(self) -> str:
        return f"{self.names.stem()} {self.rng.choice(TABLES['road_kind'])}"

    def _project(self) -> str:
        return f"the {self.names.stem()} {self.rng.choice(TABLES['project_kind'])}"

    def _product(self) -> str:
        return f"the {self.names.stem()} {self.rng.choice(TABLES['product_kind'])}"

    def _room(self) -> str:
        if self.rng.random() < 0.6:
            return f"Room {self.rng.randint(1, 499)}"
        side = self.rng.choice(("east", "west", "great", "small", "blue", "green", "red", "reading", "upper"))
        return f"the {side} {self.rng.choice(('hall', 'room', 'wing', 'studio'))}"

    def _sample(self) -> str:
        return self.rng.choice(TABLES["sample"] + TABLES["sample2"])

    def _thing(self) -> str:
        return self.rng.choice(TABLES["thing"] + TABLES["thing2"])

    def _date(self) -> str:
        return date(self.rng)

    def _weekday(self) -> str:
        return self.rng.choice(WEEKDAYS)

    def _month(self) -> str:
        return self.rng.choice(MONTHS)

    def _year(self) -> str:
        return str(self.rng.randint(1480, 1995))

    def _time(self) -> str:
        return clock(self.rng)

    def _money(self) -> str:
        return money(self.rng)

    def _num(self) -> str:
        return number(self.rng)

    def _count(self) -> str:
        return str(self.rng.randint(2, 99))

    def _version(self) -> str:
        return ".".join(str(self.rng.randint(0, 30)) for _ in range(self.rng.choice((2, 2, 3))))

    def _level(self) -> str:
        value = f"{self.rng.randint(0, 99)}.{self.rng.randint(0, 9)}"
        return f"{value} {self.rng.choice(('degrees', 'percent', 'bar', 'decibels', 'volts', 'metres', 'lux'))}"

    def _percent(self) -> str:
        whole = self.rng.randint(2, 95)
        text = f"{whole}.{self.rng.randint(1, 9)}" if self.rng.random() < 0.3 else str(whole)
        return f"{text} percent" if self.rng.random() < 0.7 else f"{text}%"

    def _duration(self) -> str:
        return duration(self.rng, UNITS[:4])

    def _years(self) -> str:
        return duration(self.rng, ("years",))

    def _stay(self) -> str:
        return duration(self.rng, ("days", "nights", "weeks"))

    def _bus(self) -> str:
        return str(self.rng.randint(1, 399))

    def _code(self) -> str:
        return code(self.rng)

    def _temp(self) -> str:
        return f"{self.rng.randint(-18, 39)} degrees"

    def _wind(self) -> str:
        return f"{self.rng.randint(30, 160)} {self.rng.choice(('km/h', 'kilometres per hour'))}"

    def _rain(self) -> str:
        return f"{self.rng.randint(2, 99)} {self.rng.choice(('millimetres', 'mm', 'litres'))}"

    def _conc(self) -> str:
        value = f"{self.rng.randint(0, 60)}.{self.rng.randint(1, 99)}"
        return f"{value} {self.rng.choice(('mg/l', 'milligrams per litre', 'micrograms per litre'))}"

    def _weight(self) -> str:
        return f"{number(self.rng)} {self.rng.choice(('tonnes', 'kilograms', 'sacks', 'crates', 'boxes'))}"
