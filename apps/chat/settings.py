"""Settings of the whole chat, and presets: a system prompt and sampling values under a name."""
from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from edge_runtime.apps.chat.errors import NotFoundError
from edge_runtime.apps.chat.store import Store
from edge_runtime.errors import InvalidRequestError

SETTINGS: dict[str, Any] = {"theme": "system", "model": None, "context": "auto", "preset": None, "models": [],
                            "sidebar": True, "port": None}
THEMES = ("system", "light", "dark")
# What the page may set; the others of SamplingParams are for programs.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
            "max_tokens", "seed", "stop")


def get(store: Store) -> dict[str, Any]:
    saved = {row["key"]: json.loads(row["value"]) for row in store.rows("SELECT key, value FROM settings")}
    return {**SETTINGS, **{key: value for key, value in saved.items() if key in SETTINGS}}


def put(store: Store, values: dict[str, Any]) -> dict[str, Any]:
    with store.transaction():
        for key, value in values.items():
            if key not in SETTINGS:
                raise InvalidRequestError("setting", key, f"one of {', '.join(SETTINGS)}")
            if key == "theme" and value not in THEMES:
                raise InvalidRequestError("theme", value, f"one of {', '.join(THEMES)}")
            store.write("INSERT INTO settings (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET "
                        "value = excluded.value", key, json.dumps(value))
    return get(store)


def presets(store: Store) -> list[dict[str, Any]]:
    return [{**row, "sampling": json.loads(row["sampling"]), "builtin": bool(row["builtin"])}
            for row in store.rows("SELECT * FROM presets ORDER BY builtin DESC, id")]


def preset(store: Store, key: int) -> dict[str, Any]:
    found = next((one for one in presets(store) if one["id"] == key), None)
    if found is None:
        raise NotFoundError("preset", key)
    return found


def save_preset(store: Store, name: str, system_prompt: str, sampling: dict[str, Any], key: int | None = None) -> int:
    """A new preset, or another state of one that is not built in."""
    name = " ".join(name.split())[:80]
    if not name:
        raise InvalidRequestError("name", name, "at least one character")
    values = (name, system_prompt, json.dumps(checked_sampling(sampling)))
    if key is None:
        return store.write("INSERT INTO presets (name, system_prompt, sampling) VALUES (?, ?, ?)", *values)
    if not store.changed("UPDATE presets SET name = ?, system_prompt = ?, sampling = ? WHERE id = ? AND NOT builtin",
                         *values, key):
        raise NotFoundError("preset of your own", key)
    return key


def delete_preset(store: Store, key: int) -> None:
    if not store.changed("DELETE FROM presets WHERE id = ? AND NOT builtin", key):
        raise NotFoundError("preset of your own", key)


def checked_sampling(values: Any) -> dict[str, Any]:
    """The values that are set, checked as the runtime will check them. Raises InvalidRequestError."""
    if not isinstance(values, dict):
        raise InvalidRequestError("sampling", values, "an object")
    for name in values:
        if name not in SAMPLING:
            raise InvalidRequestError("sampling parameter", name, f"one of {', '.join(SAMPLING)}")
    from edge_runtime.sampling import SamplingParams  # NumPy: not needed for the page to come up

    defaults = {field.name: field.default for field in fields(SamplingParams)}
    found = {name: value for name, value in values.items()
             if value is not None or (name == "max_tokens" and defaults[name] is not None)}
    SamplingParams.of(None, found)
    return found
