"""How models write tool calls: found in their chat template, read back from replies, held to by a grammar.

hermes (Qwen, Hermes and many more): <tool_call>{"name": ..., "arguments": {...}}</tool_call>, one pair of tags each.
mistral: [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]
tagged (Phi-4, Granite): <|tool_call|>[{"name": ..., "arguments": {...}}, ...]
llama: {"name": ..., "parameters": {...}} as the whole reply
A model whose template knows no tools gets them as a system message, and is asked for the first form.
"""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edge_runtime.apps.server.errors import ApiError
from edge_runtime.apps.server.tool_parser import ToolParser
from edge_runtime.structured import Grammar

if TYPE_CHECKING:
    from edge_runtime.llm import LLM
    from edge_runtime.outcome import Reply


@dataclass(frozen=True)
class ToolFormat:
    """opening, closing: marks around calls, empty where there are none; array: the marks enclose a list of calls;
    arguments: the key that holds them. opening_id: of the token where the opening is a special one, which text does not
    show."""

    name: str
    opening: str
    closing: str
    array: bool = False
    arguments: str = "arguments"
    opening_id: int | None = None


HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>")
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", "", array=True)
TAGGED = ToolFormat("tagged", "<|tool_call|>", "<|/tool_call|>", array=True)
LLAMA = ToolFormat("llama", "", "", arguments="parameters")

INSTRUCTIONS = """You may call functions to answer. Their signatures, as JSON:
<tools>
{tools}
</tools>
To call one, reply with a JSON object inside tags:
<tool_call>
{{"name": <its name>, "arguments": <an object of its arguments>}}
</tool_call>"""


@dataclass(frozen=True)
class ToolUse:
    """The tools of one request. schemas: for a template that knows tools; else None, and `instructions` say it.
    grammar: what the reply is held to. names: of the functions. parallel: more calls than one may come. optional: a
    reply may do without a call."""

    format: ToolFormat
    names: frozenset[str]
    schemas: list[dict[str, Any]] | None
    instructions: str
    grammar: Grammar | None
    parallel: bool
    llm: LLM
    optional: bool = True

    def parser(self) -> ToolParser:
        return ToolParser(self.format, self.names, self.parallel, self.llm.tokenizer)

    def parsed(self, reply: Reply) -> tuple[str, list[dict[str, Any]]]:
        """Text and calls of a whole reply."""
        parser = self.parser()
        text, calls = "", []
        for delta in parser.push(reply):
            text += delta.get("content", "")
            for part in delta.get("tool_calls", ()):
                if "id" in part:
                    calls.append({"id": part["id"], "type": "function", "function": dict(part["function"])})
                else:
                    calls[-1]["function"]["arguments"] += part["function"]["arguments"]
        return text, calls


def tool_use(llm: LLM, tools: Sequence[Mapping[str, Any]] | None, choice: Any, parallel: bool | None) -> ToolUse | None:
    """None where no tool may be called. Raises ApiError where tools and choice do not fit."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise ApiError(400, "'tool_choice' is only allowed when 'tools' are specified.", param="tool_choice",
                           code="invalid_value")
        return None
    functions = [tool["function"] for tool in tools]
    names = [function["name"] for function in functions]
    if len(set(names)) != len(names):
        raise ApiError(400, "Two tools have the same name.", param="tools", code="invalid_value")
    if choice == "none":
        return None
    wanted = functions
    if isinstance(choice, Mapping):
        wanted = [function for function in functions if function["name"] == choice["function"]["name"]]
        if not wanted:
            raise ApiError(400, f"Tool choice {choice['function']['name']!r} is not among 'tools'.",
                           param="tool_choice", code="invalid_value")
    found, known = _format_of(llm)
    many = parallel is not False
    forced = choice == "required" or isinstance(choice, Mapping)
    strict = any(function.get("strict") for function in functions)
    grammar = None
    if forced or (strict and found.opening):
        grammar = _grammar(found, wanted, forced, many and not isinstance(choice, Mapping))
    plain = [_schema(function) for function in functions]
    said = "" if known else INSTRUCTIONS.format(tools="\n".join(json.dumps(one, ensure_ascii=False) for one in plain))
    return ToolUse(found, frozenset(names), plain if known else None, said, grammar, many, llm, not forced)


def _schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """As templates print it; some fail on a function without parameters or description."""
    return {"type": "function", "function": {
        "name": function["name"], "description": function.get("description") or "",
        "parameters": function.get("parameters") or {"type": "object", "properties": {}}}}


def _format_of(llm: LLM) -> tuple[ToolFormat, bool]:
    """The model's format, and whether its template knows tools."""
    template = llm.chat_template
    if template is None:
        return HERMES, False
    variant = template.named.get("tool_use", template)
    source = variant.source
    if "tools" not in variant.variables:
        return HERMES, False
    special = llm.tokenizer.special_tokens
    for form in (MISTRAL, HERMES, TAGGED):
        if form.opening in source:
            return replace(form, opening_id=special.get(form.opening)), True
    return (LLAMA if '"parameters":' in source or "<|python_tag|>" in source else HERMES), True


def _grammar(form: ToolFormat, functions: Sequence[Mapping[str, Any]], forced: bool, many: bool) -> Grammar:
    """Lark, in llguidance's dialect: calls and nothing else where `forced`, else text in which calls are whole."""
    call = _calls_schema(form, functions)
    inner = {"type": "array", "items": call, "minItems": 1} if form.array else call
    if form.array and not many:
        inner["maxItems"] = 1
    definitions = {f"f{i}": _rooted(function.get("parameters") or {"type": "object", "properties": {},
                                                                   "additionalProperties": False}, f"#/$defs/f{i}")
                   for i, function in enumerate(functions)}
    lenient = not all(function.get("strict") for function in functions)
    schema = json.dumps({**inner, "$defs": definitions, "x-guidance": {
        "whitespace_pattern": "[ ]", "lenient": lenient}})
    opening = json.dumps(form.opening) if form.opening else ""
    if form.opening_id is not None:
        opening = f"<[{form.opening_id}]>"
    line = ('"\\n"' if forced else "SPACE?") if form.name == "hermes" else ""
    closing = f"{line} {json.dumps(form.closing)}" if form.closing and form.opening_id is None else ""
    body = f"{line} json {closing}"
    head = "%llguidance {}\n" + f"json: %json {schema}\n"
    if forced:
        more = f' ("\\n" {opening} {body})*' if many and form.name == "hermes" else ""
        return Grammar.lark(f"{head}start: {opening} {body}{more}\n")
    if form.opening_id is not None:
        return Grammar.lark(f"{head}start: (TEXT {opening} {body})* TEXT\nTEXT: /(.|\\n)*/\n")
    return Grammar.lark(f"{head}start: (opened {body})* TEXT\nopened[lazy]: TEXT {opening}\nTEXT: /(.|\\n)*/\n"
                        "SPACE: /[ \\n]+/\n")


def _calls_schema(form: ToolFormat, functions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    calls = [{"type": "object", "properties": {"name": {"const": function["name"]},
                                               form.arguments: {"$ref": f"#/$defs/f{i}"}},
              "required": ["name", form.arguments], "additionalProperties": False}
             for i, function in enumerate(functions)]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def _rooted(schema: Any, root: str) -> Any:
    """A schema whose references to its own root follow it to another place."""
    if isinstance(schema, list):
        return [_rooted(one, root) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {key: root + value[1:] if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _rooted(value, root) for key, value in schema.items()}
