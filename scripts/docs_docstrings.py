"""The reference shows the project's docstrings: `name: what it is`, of a parameter or field, becomes a list's item."""
from __future__ import annotations

import re
from typing import Any

import griffe


class NamedItems(griffe.Extension):
    """A griffe extension, called once the package is read."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        self._walk(pkg)

    def _walk(self, found: Any) -> None:
        for member in found.members.values():
            if member.is_alias:
                continue
            if member.docstring is not None and (member.is_function or member.is_class):
                member.docstring.value = as_list(member.docstring.value, _names(member))
            if member.is_module or member.is_class:
                self._walk(member)


def _names(found: Any) -> set[str]:
    if found.is_function:
        return {parameter.name for parameter in found.parameters}
    names = {name for name, member in found.members.items() if member.is_attribute or member.is_function}
    init = found.members.get("__init__")
    return names | ({parameter.name for parameter in init.parameters} if init is not None else set())


def as_list(text: str, names: set[str]) -> str:
    """Markdown of a docstring."""
    names = {name for name in names if not name.startswith("_")}
    if not names:
        return text
    name = "(?:" + "|".join(sorted(map(re.escape, names), key=len, reverse=True)) + ")"
    start = re.compile(rf"(?:^|(?<=[.;)]\s))({name}(?:, {name})*): ", re.M)
    return "\n\n".join(_paragraph(paragraph, start) for paragraph in re.split(r"\n\s*\n", text))


def _paragraph(paragraph: str, start: re.Pattern[str]) -> str:
    pieces = start.split(paragraph)
    if len(pieces) < 3:
        return paragraph
    head, rest = pieces[0].rstrip(), ""
    items = []
    for names, body in zip(pieces[1::2], pieces[2::2]):
        body, found, after = body.partition("\nRaises ")
        rest = "\n\nRaises " + after if found else rest
        shown = ", ".join(f"`{name}`" for name in names.split(", "))
        items.append(f"- {shown}: {' '.join(body.split())}")
    return (head + "\n\n" if head else "") + "\n".join(items) + rest
