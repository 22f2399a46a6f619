"""The notation of the document kinds, parsed and rendered.

A kind is `KIND name`, an optional `form:` (report, mail, thread, message), `title:` variants, and statements. A
statement starts with `= name` (`!` marks it as one that a summary keeps) and has lines `d:` (a wording in the
document), `b:` (its sentence in the summary), `f:` (slots that are key facts), `q: question | question => answer`. `x:`
lines are distractors. `s: question | question => {slot} {slot}` asks for a sum; its answer shows the working,
`34 + 17 = 51`, because a small model adds well only digits that it has just copied. `{slot}` is a value of
`slots.Slots`, `[a|b]` a free choice of words.
"""
from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

from .slots import Slots

_SLOT = re.compile(r"\{([a-z]+\d?(?:\.[a-z]+)?)\}")
_CHOICE = re.compile(r"\[([^\[\]]*)\]")


@dataclass(frozen=True)
class Ask:
    """Wordings of one question and the template of its exact answer."""

    wordings: tuple[str, ...]
    answer: str
    is_sum: bool = False


@dataclass
class Statement:
    name: str
    key: bool
    wordings: list[str] = field(default_factory=list)
    brief: str = ""
    facts: tuple[str, ...] = ()
    asks: list[Ask] = field(default_factory=list)


@dataclass
class Kind:
    name: str
    form: str = "report"
    titles: list[str] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    distractors: list[str] = field(default_factory=list)


def parse_kinds(text: str) -> list[Kind]:
    """Kinds of a notation text. ValueError names the line that is not in the notation."""
    kinds: list[Kind] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line:
            continue
        mark, _, rest = line.partition(" ")
        if mark == "KIND":
            kinds.append(Kind(rest))
        elif mark == "=":
            kinds[-1].statements.append(Statement(rest.rstrip("!"), rest.endswith("!")))
        elif mark == "form:":
            kinds[-1].form = rest
        elif mark == "title:":
            kinds[-1].titles = [t.strip() for t in rest.split(" | ")]
        elif mark == "d:":
            kinds[-1].statements[-1].wordings.append(rest)
        elif mark == "b:":
            kinds[-1].statements[-1].brief = rest
        elif mark == "f:":
            kinds[-1].statements[-1].facts = tuple(rest.split())
        elif mark in ("q:", "s:"):
            questions, answer = rest.split(" => ")
            wordings = tuple(q.strip() for q in questions.split(" | "))
            kinds[-1].statements[-1].asks.append(Ask(wordings, answer, is_sum=mark == "s:"))
        elif mark == "x:":
            kinds[-1].distractors.append(rest)
        else:
            raise ValueError(f"line {number}: {line!r} is not in the notation")
    return kinds


def fill(template: str, slots: Slots, rng: random.Random) -> str:
    """A template as a text: choices made, slots filled."""
    chosen = _CHOICE.sub(lambda match: rng.choice(match.group(1).split("|")), template)
    return _SLOT.sub(lambda match: slots.get(match.group(1)), chosen)


def worked_sum(first: str, second: str) -> str:
    """`34 + 17 = 51` of two whole numbers."""
    return f"{first} + {second} = {int(first) + int(second)}"


def sentence(template: str, slots: Slots, rng: random.Random) -> str:
    """`fill` with a capital first letter and one full stop where a value already ends in one (`9 a.m..`)."""
    text = fill(template, slots, rng).replace("..", ".")
    return text[0].upper() + text[1:]


def titled(template: str, slots: Slots, rng: random.Random) -> str:
    text = fill(template, slots, rng)
    return text[0].upper() + text[1:]
