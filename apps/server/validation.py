"""Request bodies against their JSON schemas, the very ones that the OpenAPI page shows; errors in OpenAI's words.

Knows the keywords that schemas.py uses: type, enum, minimum, maximum, exclusiveMinimum, minLength, maxLength, items,
minItems, maxItems, properties, required, additionalProperties, anyOf, $ref.
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edge_runtime.apps.server.errors import ApiError

Schema = Mapping[str, Any]
_ARTICLES = {"object": "an object", "array": "an array", "string": "a string", "integer": "an integer",
             "number": "a number", "boolean": "a boolean", "null": "null"}


def validated(value: Any, schema: Schema, components: Mapping[str, Schema], path: str = "") -> Any:
    """`value`, with whole numbers that came as 1.0 made int. Raises ApiError 400 with `param` for the first breach."""
    if "$ref" in schema:
        return validated(value, components[schema["$ref"].rpartition("/")[2]], components, path)
    if "anyOf" in schema:
        return _any_of(value, schema["anyOf"], components, path)
    kinds = schema.get("type")
    if kinds is not None:
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if not any(_is(value, kind) for kind in kinds):
            raise _wrong_type(value, kinds, path)
    if "enum" in schema and not any(value == one and type(value) is type(one) for one in schema["enum"]):
        raise _breach(f"Invalid value for '{path}': {_shown(value)}. Supported values are: "
                      f"{_listed([_shown(one) for one in schema['enum']])}.", path, "invalid_value")
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        return _number(value, schema, kinds or (), path)
    if isinstance(value, str):
        _length(len(value), schema, "minLength", "maxLength", "string", "characters", path)
        return value
    if isinstance(value, list):
        _length(len(value), schema, "minItems", "maxItems", "array", "items", path)
        items = schema.get("items")
        return value if items is None or _whole_numbers(value, items) else [
            validated(one, items, components, f"{path}[{i}]") for i, one in enumerate(value)]
    return _object(value, schema, components, path)


def _whole_numbers(value: list[Any], items: Schema) -> bool:
    """Whether a list of token ids, which may be millions, is right at one look."""
    return (items.get("type") == "integer" and bool(value) and all([type(one) is int for one in value])
            and min(value) >= items.get("minimum", -math.inf) and max(value) <= items.get("maximum", math.inf))


def kind_of(value: Any) -> str:
    if value is None:
        return "null"
    for kind, types in (("boolean", bool), ("integer", int), ("number", float), ("string", str), ("array", list)):
        if isinstance(value, types):
            return kind
    return "object"


def _is(value: Any, kind: str) -> bool:
    found = kind_of(value)
    if kind == "integer":
        return found == "integer" or (found == "number" and value.is_integer())
    return found == kind or (kind == "number" and found == "integer")


def _number(value: float, schema: Schema, kinds: Any, path: str) -> Any:
    whole = "integer" in kinds and isinstance(value, float)
    if whole and abs(value) >= 2**63:  # the parser's way to say that it is longer than 64 bits
        value = int(value) * 2
    elif whole:
        value = int(value)
    name = "integer" if "integer" in kinds else "decimal"
    for key, breaks, code, word in (
            ("minimum", lambda limit: value < limit, "below_min_value", ">="),
            ("exclusiveMinimum", lambda limit: value <= limit, "below_min_value", ">"),
            ("maximum", lambda limit: value > limit, "above_max_value", "<=")):
        if key in schema and breaks(schema[key]):
            raise _breach(f"Invalid '{path}': {code.replace('_', ' ')}. Expected a value {word} {schema[key]}, but got "
                          f"{_shown(value)} instead.", path, f"{name}_{code}")
    return value


def _length(length: int, schema: Schema, low: str, high: str, kind: str, unit: str, path: str) -> None:
    if length < schema.get(low, 0):
        few = f"empty_{kind}" if length == 0 else f"{kind}_below_min_length"
        raise _breach(f"Invalid '{path}': expected at least {schema[low]} {unit}, but got {length}.", path, few)
    if high in schema and length > schema[high]:
        raise _breach(f"Invalid '{path}': expected at most {schema[high]} {unit}, but got {length}.", path,
                      f"{kind}_above_max_length")


def _object(value: dict[str, Any], schema: Schema, components: Mapping[str, Schema], path: str) -> dict[str, Any]:
    properties, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
    dot = f"{path}." if path else ""
    if "type" in value and "enum" in properties.get("type", ()):  # of another kind: it says nothing that this lacks
        validated(value["type"], properties["type"], components, f"{dot}type")
    for name in schema.get("required", ()):
        if name not in value:
            raise _breach(f"Missing required parameter: '{dot}{name}'.", dot + name, "missing_required_parameter")
    out = {}
    for name, one in value.items():
        inner = properties.get(name)
        if inner is None:
            if rest is False:
                raise _breach(f"Unknown parameter: '{dot}{name}'.", dot + name, "unknown_parameter")
            inner = rest if isinstance(rest, Mapping) else {}
        out[name] = validated(one, inner, components, dot + name)
    return out


def _any_of(value: Any, options: Any, components: Mapping[str, Schema], path: str) -> Any:
    breaches: list[ApiError] = []
    for option in options:
        try:
            return validated(value, option, components, path)
        except ApiError as error:
            breaches.append(error)
    # The branch whose types fit says most, of those the one that got deepest.
    inner = [error for error in breaches if error.code != "invalid_type" or error.param != (path or None)]
    if inner:
        raise max(inner, key=lambda error: (error.code != "invalid_type", len(error.param or "")))
    kinds = []
    for option in options:
        while "$ref" in option:
            option = components[option["$ref"].rpartition("/")[2]]
        found = option.get("type", ())
        kinds += [found] if isinstance(found, str) else list(found)
    raise _wrong_type(value, list(dict.fromkeys(kinds)), path)


def _wrong_type(value: Any, kinds: list[str], path: str) -> ApiError:
    return _breach(f"Invalid type for '{path or 'body'}': expected {_listed([_ARTICLES[kind] for kind in kinds])}, but "
                   f"got {_ARTICLES[kind_of(value)]} instead.", path, "invalid_type")


def _breach(message: str, path: str, code: str) -> ApiError:
    return ApiError(400, message, param=path or None, code=code)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
