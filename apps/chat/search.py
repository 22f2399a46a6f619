"""Full-text search over titles, messages and attachments."""
from __future__ import annotations

import re
from typing import Any

from edge_runtime.apps.chat.schema import ATTACHMENT, MESSAGE, TITLE
from edge_runtime.apps.chat.store import Store

MARK, END_MARK = "\x02", "\x03"  # around what matched, in excerpts; they come in no text that is typed
KINDS = {MESSAGE: "message", TITLE: "title", ATTACHMENT: "attachment"}
# Scripts without spaces between words: the index knows only whole runs of them, so they are looked for as they are.
_UNSPACED = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_SELECT = """
SELECT search.rowid AS key, search.conversation, c.title, {excerpt} AS excerpt
FROM search JOIN conversations c ON c.id = search.conversation WHERE {where} ORDER BY {order} LIMIT ?
"""


def find(store: Store, query: str, limit: int = 50) -> list[dict[str, Any]]:
    """Hits, best first: {conversation, title, kind, message, excerpt}. All words must occur; the last one may be a
    beginning; "in quotes" is a phrase."""
    query = query.replace("\0", " ").strip()  # FTS5 reads up to the first
    if not query:
        return []
    if _UNSPACED.search(query):
        rows = store.rows(_SELECT.format(excerpt="substr(text, max(1, instr(text, ?) - 30), 160)",
                                         where="text LIKE ? ESCAPE '\\'", order="c.updated DESC"),
                          query, f"%{_escaped(query)}%", limit)
        rows = [{**row, "excerpt": row["excerpt"].replace(query, f"{MARK}{query}{END_MARK}")} for row in rows]
    else:
        match = match_expression(query)
        if not match:
            return []
        rows = store.rows(_SELECT.format(excerpt=f"snippet(search, 0, '{MARK}', '{END_MARK}', '…', 20)",
                                         where="search MATCH ?", order="rank, c.updated DESC"), match, limit)
    return [_hit(store, row) for row in rows]


def match_expression(query: str) -> str:
    """FTS5's language for what a person typed: every word quoted, so that no character of it is an operator."""
    words = re.findall(r'"([^"]+)"|(\S+)', query)
    terms = []
    for phrase, word in words:
        text = (phrase or word).replace('"', " ").strip()
        if re.search(r"\w", text):
            terms.append(f'"{text}"')
    if terms and not query.rstrip().endswith('"'):
        terms[-1] += "*"
    return " ".join(terms)


def _hit(store: Store, row: dict[str, Any]) -> dict[str, Any]:
    key, kind = divmod(row.pop("key"), 4)
    message: int | None = key if kind == MESSAGE else None
    if kind == ATTACHMENT:
        owner = store.row("SELECT message FROM attachments WHERE id = ?", key)
        message = owner["message"] if owner else None
    return {**row, "kind": KINDS[kind], "message": message}


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
