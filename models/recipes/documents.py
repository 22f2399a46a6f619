"""Synthetic documents: text, reference summary, key facts and questions, all from one seeded generator."""
from __future__ import annotations

import random
from dataclasses import dataclass

from ..bundled import UNKNOWN_ANSWER
from . import kinds_field, kinds_mail, kinds_tech, kinds_work
from .grammar import Ask, Kind, Statement, fill, parse_kinds, sentence, titled, worked_sum
from .slots import Slots, code

UNKNOWN = UNKNOWN_ANSWER

KINDS: list[Kind] = [kind for text in (kinds_work.KINDS, kinds_field.KINDS, kinds_mail.KINDS, kinds_tech.KINDS)
                     for kind in parse_kinds(text)]
REPORTS = [kind for kind in KINDS if kind.form == "report"]

# Pairs that contradict each other; only the first is kept.
_EXCLUSIVE = {"sales": ("change", "drop")}

_SUBJECTS = ("A request", "Quick question", "Short note", "News", "For your information", "Next week", "Please read",
             "Update", "One more thing", "Plan", "Reminder", "About our talk")
_GREETINGS = ("Hi {reader},", "Hello {reader},", "Dear {reader},", "Good morning {reader},", "Hi {reader}!")
_CLOSINGS = ("Best regards", "Kind regards", "Thanks", "Best wishes", "Many thanks", "See you", "Cheers", "Yours")
_BYLINES = ("Prepared by: {person8}", "Reference: {code8}", "Filed: {date8}", "Distribution: {dept8}",
            "Copy to: {person8}")

# Sentences that fit anywhere and that no summary keeps.
_FILLERS = (
    "Nothing else happened on that day.", "The rest can wait.", "Details will follow.", "{person9} was informed.",
    "This note was written in a hurry.", "There were no other remarks.", "Everybody was in a good mood.",
    "The next page lists the addresses.", "A copy was sent to {person9}.", "It had been a long week.",
    "The telephone rang all morning.", "Some names are missing from the list.", "The figures were checked twice.",
    "Not everybody agrees with that.", "More about this on {weekday9}.", "The heating was on.", "Lunch was late.",
    "An older version is kept in folder {code9}.", "In {month9} things looked different.", "The room was rather cold.",
    "The printer ran out of paper again.", "People talked about it for a while.", "It was dark by {time9}.",
    "Thanks to everyone who helped.", "A photograph shows the place as it was.", "The road to {town9} was empty.",
    "{person9} from {town9} sends greetings.", "There was little to add.", "As always, the coffee was strong.",
    "The list has {num9} entries.", "This was to be expected.", "A few points are still open.",
)


@dataclass(frozen=True)
class Document:
    """points: the summary's sentences, in the order of the text. facts: strings that occur in `text` (up to the case of
    a first letter) and that a good summary keeps. questions: (question, exact answer) pairs; the answer occurs in
    `text`, is a worked sum of two numbers in it, or is `UNKNOWN`."""

    kind: str
    text: str
    points: tuple[str, ...]
    facts: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]

    @property
    def summary(self) -> str:
        return " ".join(self.points)

    def summary_points(self) -> str:
        return "\n".join(f"- {point}" for point in self.points)


def pick(kind: Kind, rng: random.Random, keys: int, others: int) -> list[Statement]:
    """The opening statement, up to `keys` further key statements and `others` minor ones, in the kind's order with
    some freedom after the opening."""
    opening, rest = kind.statements[0], kind.statements[1:]
    key = [s for s in rest if s.key]
    minor = [s for s in rest if not s.key]
    chosen = rng.sample(key, min(keys, len(key))) + rng.sample(minor, min(others, len(minor)))
    names = {s.name for s in chosen}
    first, second = _EXCLUSIVE.get(kind.name, ("", ""))
    if first in names and second in names:
        chosen = [s for s in chosen if s.name != second]
    chosen.sort(key=kind.statements.index)
    if rng.random() < 0.35:
        rng.shuffle(chosen)
    return [opening, *chosen]


def _body(kind: Kind, statements: list[Statement], slots: Slots, rng: random.Random, distractors: int) -> list[str]:
    """The document's sentences: statements in order, distractors strewn between them."""
    lines = [sentence(rng.choice(s.wordings), slots, rng) for s in statements]
    if distractors == 0:
        return lines
    own = rng.sample(kind.distractors, min(distractors, len(kind.distractors)))
    for template in own[: max(1, distractors * 2 // 3)] + rng.sample(_FILLERS, distractors // 3):
        lines.insert(rng.randint(0 if rng.random() < 0.15 else 1, len(lines)), sentence(template, slots, rng))
    return lines


def _paragraphs(lines: list[str], rng: random.Random) -> str:
    style = rng.random()
    if style < 0.1:
        return "\n".join(f"- {line}" for line in lines)
    if style < 0.6 or len(lines) < 4:
        return " ".join(lines)
    cut = rng.randint(2, len(lines) - 2)
    return " ".join(lines[:cut]) + "\n\n" + " ".join(lines[cut:])


def _ask(statement: Statement, slots: Slots, rng: random.Random, known: bool) -> list[tuple[str, str]]:
    return [(fill(rng.choice(ask.wordings), slots, rng), _answer(ask, slots, rng) if known else UNKNOWN)
            for ask in statement.asks]


def _answer(ask: Ask, slots: Slots, rng: random.Random) -> str:
    answer = fill(ask.answer, slots, rng)
    return worked_sum(*answer.split()) if ask.is_sum else answer


def _questions(kind: Kind, statements: list[Statement], slots: Slots, rng: random.Random) -> list[tuple[str, str]]:
    """All answerable questions shuffled, with about one in eight of them unanswerable."""
    known = [pair for s in statements for pair in _ask(s, slots, rng, True)]
    rng.shuffle(known)
    present = {s.name for s in statements}
    if present & set(_EXCLUSIVE.get(kind.name, ())):
        present |= set(_EXCLUSIVE[kind.name])
    asked = {question for question, _ in known}
    unknown = [pair for s in kind.statements if s.name not in present for pair in _ask(s, slots, rng, False)]
    unknown = [pair for pair in unknown if pair[0] not in asked]
    rng.shuffle(unknown)
    for pair in unknown[: max(1, len(known) // 8)]:
        known.insert(rng.randint(0, min(4, len(known))), pair)
    return known


def _mail(text: str, slots: Slots, rng: random.Random) -> str:
    sender, reader = slots.get("sender"), slots.get("reader")
    greeting = rng.choice(_GREETINGS).format(reader=reader)
    closing = rng.choice(_CLOSINGS)
    head = f"Subject: {rng.choice(_SUBJECTS)}\n" if rng.random() < 0.6 else ""
    if rng.random() < 0.4:
        head = f"From: {sender}\nTo: {reader}\n" + head
    return f"{head}\n{greeting}\n\n{text}\n\n{closing},\n{sender}".lstrip("\n")


def _thread(kind: Kind, statements: list[Statement], slots: Slots, rng: random.Random, distractors: int) -> str:
    """Mails to and fro; the statements' places in the kind say which mail they stand in."""
    sender, reader = slots.get("sender"), slots.get("reader")
    subject, closing, formal = rng.choice(_SUBJECTS), rng.choice(_CLOSINGS), rng.random() < 0.7
    parts: list[list[str]] = [[], [], []]
    for statement in statements:
        place = (kind.statements.index(statement) + 1) // 2
        parts[place].append(sentence(rng.choice(statement.wordings), slots, rng))
    for template in rng.sample(kind.distractors, min(distractors, len(kind.distractors))):
        lines = parts[rng.randrange(3)]
        lines.insert(rng.randint(0, len(lines)), sentence(template, slots, rng))
    mails: list[str] = []
    for place, lines in enumerate(parts):
        writer, other = (reader, sender) if place == 1 else (sender, reader)
        if not lines:
            continue
        title = f"Subject: {'Re: ' if mails else ''}{subject}\n" if formal else ""
        greeting = rng.choice(_GREETINGS).format(reader=other)
        mails.append(f"From: {writer}\nTo: {other}\n{title}\n{greeting}\n\n{' '.join(lines)}\n\n{closing},\n{writer}")
    return "\n\n".join(mails)


def _message(text: str, slots: Slots, rng: random.Random) -> str:
    sender, reader = slots.get("sender"), slots.get("reader")
    style = rng.randrange(3)
    if style == 0:
        return f"Hi {reader}! {text} {sender}"
    if style == 1:
        return f"{reader}, {text[0].lower() + text[1:] if text.startswith(('Let', 'Be', 'Did')) else text}\n{sender}"
    return f"Message from {sender} to {reader}: {text}"


def _report(kind: Kind, text: str, slots: Slots, rng: random.Random) -> str:
    style = rng.random()
    if style < 0.12:
        return text
    title = titled(rng.choice(kind.titles), slots, rng)
    if style < 0.3:
        return f"{title}\n{fill(rng.choice(_BYLINES), slots, rng)}\n\n{text}"
    return f"{title}\n\n{text}" if style < 0.9 else f"{title}: {text}"


def make_document(rng: random.Random, held_out: bool | None = False, kind: Kind | None = None) -> Document:
    """One document of a kind (drawn where None). held_out: see `slots.Names`."""
    kind = kind or rng.choice(KINDS)
    slots = Slots(rng, held_out)
    statements = pick(kind, rng, keys=rng.choice((1, 2, 3, 3, 4, 4, 5)), others=rng.randint(0, 1))
    distractors = rng.randint(0, 3) if rng.random() < 0.6 else rng.randint(3, 9)
    if kind.form == "thread":
        statements.sort(key=kind.statements.index)
        text = _thread(kind, statements, slots, rng, distractors)
    else:
        text = _paragraphs(_body(kind, statements, slots, rng, distractors), rng)
    if kind.form == "mail":
        text = _mail(text, slots, rng)
    elif kind.form == "message":
        text = _message(text.replace("\n\n", " ").replace("\n", " ").replace("- ", ""), slots, rng)
    elif kind.form == "report":
        text = _report(kind, text, slots, rng)
    kept = [s for s in statements if s.key]
    points = tuple(sentence(s.brief, slots, rng) for s in kept)
    facts = tuple(dict.fromkeys(slots.get(name) for s in kept for name in s.facts))
    return Document(kind.name, text, points, facts, tuple(_questions(kind, statements, slots, rng)))


_DIGESTS = ("Weekly digest", "Monthly overview", "News in brief", "Daily briefing", "Overview of the week", "Bulletin")
_PREFIXES = ("", "", "{n}. ", "## ", "Section {n}: ")


def make_digest(rng: random.Random, held_out: bool | None = False, sections: int | None = None) -> Document:
    """A report of several sections; its summary keeps the opening statement of each."""
    kinds = rng.sample(REPORTS, sections or rng.randint(2, 6))
    prefix = rng.choice(_PREFIXES)
    parts, briefs, questions = [f"{rng.choice(_DIGESTS)} {code(rng)}"], [], []
    facts: list[str] = []
    for n, kind in enumerate(kinds, 1):
        slots = Slots(rng, held_out)
        statements = pick(kind, rng, keys=rng.randint(1, 3), others=rng.randint(0, 1))
        lines = _body(kind, statements, slots, rng, rng.randint(0, 2))
        title = titled(rng.choice(kind.titles), slots, rng)
        parts.append(f"{prefix.format(n=n)}{title}\n" + " ".join(lines))
        briefs.append(sentence(kind.statements[0].brief, slots, rng))
        facts += [slots.get(name) for name in kind.statements[0].facts]
        questions += [_ask(s, slots, rng, True)[0] for s in statements[1:2] if s.asks]
    rng.shuffle(questions)
    return Document("digest", "\n\n".join(parts), tuple(briefs), tuple(dict.fromkeys(facts)), tuple(questions))


_REGISTERS = (
    ("Phone list", "person", "num", "What is the number of {}?"),
    ("Room list", "person", "room", "Where does {} sit?"),
    ("Stock list", "item", "num", "How many {} are there?"),
    ("Price list", "item", "money", "How much are the {}?"),
    ("Opening dates", "museum", "date", "When does {} open?"),
    ("Timetable", "town", "time", "When does the train to {} leave?"),
    ("Duty roster", "weekday", "person", "Who is on duty on {}?"),
    ("Key register", "room", "code", "Which key opens {}?"),
    ("Orders", "org", "item", "What did {} order?"),
    ("Inventory", "item", "count", "How many {} are left?"),
    ("Calls per day", "weekday", "count", "How many calls came on {}?"),
    ("Visitors", "town", "count", "How many visitors came from {}?"),
)


def make_register(rng: random.Random, held_out: bool | None = False) -> Document:
    """A list of name and value, for looking up. It has no summary and no key facts."""
    title, left, right, question = rng.choice(_REGISTERS)
    slots = Slots(rng, held_out)
    rows = rng.randint(3, 7)
    pairs = [(slots.get(f"{left}{n}"), slots.get(f"{right}{n}")) for n in range(1, rows + 1)]
    separator = rng.choice((": ", " - ", ", "))
    missing = slots.get(f"{left}9") if left != "weekday" else ""
    text = title + "\n" + "\n".join(f"{name}{separator}{value}" for name, value in pairs)
    questions = [(question.format(name), value) for name, value in pairs]
    rng.shuffle(questions)
    if right == "count":
        (first, one), (second, other) = rng.sample(pairs, 2)
        total = (question.format(f"{first} and {second}").replace("?", " together?"), worked_sum(one, other))
        questions.insert(rng.randint(0, 2), total)
    if missing:
        questions.insert(rng.randint(0, 3), (question.format(missing), UNKNOWN))
    return Document("register", text, (), (), tuple(questions))
