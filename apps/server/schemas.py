"""JSON schemas of the request bodies: what validation.py checks and openapi.py shows. Pure data.

Parameters of OpenAI's that mean nothing on one's own machine (user, store, metadata ...) are taken and ignored; names
that nobody knows are refused, so that a misspelt one is noticed.
"""
from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
INT64 = 2**63 - 1


def obj(properties: dict[str, Schema], required: tuple[str, ...] = (), *, closed: bool = True, **more: Any) -> Schema:
    out: Schema = {"type": "object", "properties": properties, **more}
    if required:
        out["required"] = list(required)
    if closed:
        out["additionalProperties"] = False
    return out


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def nullable(schema: Schema) -> Schema:
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}
    out = {**schema, "type": [schema["type"], "null"]}
    if "enum" in schema:
        out["enum"] = [*schema["enum"], None]
    return out


def number(low: float, high: float, what: str) -> Schema:
    return nullable({"type": "number", "minimum": low, "maximum": high, "description": what})


def integer(low: int, high: int, what: str) -> Schema:
    return nullable({"type": "integer", "minimum": low, "maximum": high, "description": what})


def boolean(what: str) -> Schema:
    return nullable({"type": "boolean", "description": what})


STRING: Schema = {"type": "string"}
ANY_OBJECT: Schema = {"type": "object"}
MODEL: Schema = {"type": "string", "description": "One of the names that /v1/models lists."}
TEXT_PART = obj({"type": {"type": "string", "enum": ["text", "input_text", "output_text"]}, "text": STRING},
                ("type", "text"), closed=False)
CONTENT: Schema = {"anyOf": [STRING, {"type": "array", "items": ref("TextPart")}, {"type": "null"}]}
FUNCTION_NAME: Schema = {"type": "string", "minLength": 1, "maxLength": 64}

COMPONENTS: dict[str, Schema] = {
    "TextPart": TEXT_PART,
    "ToolCall": obj({"id": STRING, "type": {"type": "string", "enum": ["function"]},
                     "function": obj({"name": FUNCTION_NAME, "arguments": STRING}, ("name", "arguments"),
                                     closed=False)}, ("function",), closed=False),
    "Message": obj({
        "role": {"type": "string", "enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": CONTENT, "name": nullable(STRING), "tool_call_id": nullable(STRING),
        "tool_calls": nullable({"type": "array", "items": ref("ToolCall")})}, ("role",), closed=False),
    "Tool": obj({
        "type": {"type": "string", "enum": ["function"]},
        "function": obj({"name": FUNCTION_NAME, "description": nullable(STRING), "parameters": nullable(ANY_OBJECT),
                         "strict": boolean("Hold a call's arguments to the schema wherever the model calls.")},
                        ("name",), closed=False)}, ("type", "function"), closed=False),
    "ResponseTool": obj({
        "type": {"type": "string", "enum": ["function"]}, "name": FUNCTION_NAME, "description": nullable(STRING),
        "parameters": nullable(ANY_OBJECT), "strict": boolean("Hold a call's arguments to the schema.")},
        ("type", "name"), closed=False),
    "EarlyExit": obj({
        "missing_kv": {"type": "string", "enum": ["verify", "recompute", "propagate"]},
        "criterion": {"type": "string", "enum": ["max_prob", "margin", "entropy", "layer"]},
        "thresholds": nullable({"type": "object", "additionalProperties": {"type": "number", "exclusiveMinimum": 0,
                                                                           "maximum": 1}}),
        "layer": integer(1, 10_000, "The exit that the criterion 'layer', or drafting, uses."),
        "max_pending": {"type": "integer", "minimum": 1, "maximum": 64},
        "max_draft": {"type": "integer", "minimum": 1, "maximum": 16}}),
}

EXTENSIONS: dict[str, Schema] = {
    "top_k": integer(0, INT64, "Draw among the k likeliest tokens; 0: all."),
    "min_p": number(0, 1, "Drop tokens less than this times as likely as the likeliest."),
    "repetition_penalty": nullable({"type": "number", "minimum": 0.01, "maximum": 100,
                                    "description": "Above 1, tokens seen become less likely."}),
    "ignore_eos": boolean("Go on after the model's end token."),
    "stop_token_ids": nullable({"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": INT64}}),
    "early_exit": {"anyOf": [{"type": "string", "enum": ["verify", "recompute", "propagate"]}, ref("EarlyExit"),
                             {"type": "boolean", "enum": [False]}, {"type": "null"}],
                   "description": "How tokens may leave the network early; for models with exit layers."},
    "priority": nullable({"type": "string", "enum": ["interactive", "batch"],
                          "description": "Interactive requests come first; batch requests fill what is left."}),
    "placement": nullable({"type": "string", "enum": ["auto", "host", "device", "split"],
                           "description": "Where this request's KV is to live. Refused where the model cannot."}),
}

# Taken, and without effect here.
IGNORED: dict[str, Schema] = {
    "user": nullable(STRING), "metadata": nullable(ANY_OBJECT), "store": nullable({"type": "boolean"}),
    "service_tier": nullable(STRING), "safety_identifier": nullable(STRING), "prompt_cache_key": nullable(STRING),
    "prompt_cache_retention": nullable(STRING)}

SAMPLING: dict[str, Schema] = {
    "temperature": number(0, 2, "0 takes the likeliest token each time. Default 0.7."),
    "top_p": number(0, 1, "Draw among the fewest tokens that hold this share. Default 0.95."),
    "seed": nullable({"type": "integer", "minimum": -INT64 - 1, "maximum": INT64}),
    "stop": {"anyOf": [{"type": "string"}, {"type": "array", "maxItems": 16, "items": {"type": "string"}},
                       {"type": "null"}], "description": "Texts that end the reply; none of them empty."},
    "presence_penalty": number(-2, 2, "Taken off the logits of tokens in the reply."),
    "frequency_penalty": number(-2, 2, "The same, once per occurrence."),
    "logit_bias": nullable({"type": "object", "additionalProperties": {"type": "number", "minimum": -100,
                                                                       "maximum": 100},
                            "description": "Token id, as a string -> added to its logit."}),
    "n": integer(1, 128, "Replies to one prompt, which is computed once."),
    "stream": boolean("Server-sent events, ended by [DONE]."),
    "stream_options": nullable(obj({"include_usage": boolean("One more chunk with the usage, before the end."),
                                    "include_obfuscation": boolean("Taken, and without effect.")})),
}

FORMATS: Schema = {"anyOf": [
    obj({"type": {"type": "string", "enum": ["text", "json_object"]}}, ("type",), closed=False),
    obj({"type": {"type": "string", "enum": ["json_schema"]}, "json_schema": obj({
        "name": STRING, "description": nullable(STRING), "schema": {"type": ["object", "boolean"]},
        "strict": boolean("False: keywords that cannot be enforced are left unchecked.")}, ("schema",))},
        ("type", "json_schema")),
    obj({"type": {"type": "string", "enum": ["regex"]}, "regex": STRING}, ("type", "regex")),
    obj({"type": {"type": "string", "enum": ["lark"]}, "lark": STRING}, ("type", "lark")),
    {"type": "null"}]}

CHAT_REQUEST = obj({
    "model": MODEL, "messages": {"type": "array", "minItems": 1, "items": ref("Message")}, **SAMPLING,
    "max_tokens": integer(1, INT64, "Most tokens of a reply; none: until the context is full."),
    "max_completion_tokens": integer(1, INT64, "The same, by its newer name."),
    "logprobs": boolean("Report the log-probability of each token."),
    "top_logprobs": integer(0, 20, "And of so many of the likeliest; needs logprobs."),
    "response_format": FORMATS,
    "tools": nullable({"type": "array", "maxItems": 128, "items": ref("Tool")}),
    "tool_choice": {"anyOf": [
        {"type": "string", "enum": ["none", "auto", "required"]},
        obj({"type": {"type": "string", "enum": ["function"]}, "function": obj({"name": STRING}, ("name",))},
            ("type", "function")), {"type": "null"}]},
    "parallel_tool_calls": boolean("False: at most one call in a reply."),
    "modalities": nullable({"type": "array", "items": {"type": "string", "enum": ["text"]}}),
    "reasoning_effort": nullable(STRING), "verbosity": nullable(STRING),
    "reasoning_format": nullable({"type": "string", "enum": ["none", "separate"],
                                  "description": "Where a thought, <think>...</think>, goes that a reply begins with: "
                                                 "none (default): into content, as it is written; separate: into "
                                                 "reasoning_content."}),
    "chat_template_kwargs": nullable({"type": "object", "description": "Further variables of the chat template."}),
    **EXTENSIONS, **IGNORED}, ("model", "messages"))

TOKENS: Schema = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": INT64}}
PROMPT: Schema = {"anyOf": [
    STRING, {"type": "array", "minItems": 1, "maxItems": 2048, "items": STRING}, TOKENS,
    {"type": "array", "minItems": 1, "maxItems": 2048, "items": TOKENS}]}

COMPLETION_REQUEST = obj({
    "model": MODEL, "prompt": {**PROMPT, "description": "A text, token ids, or a list of either."}, **SAMPLING,
    "max_tokens": integer(0, INT64, "Most tokens of a reply. Default 16."),
    "logprobs": integer(0, 5, "Report log-probabilities, and those of so many of the likeliest tokens."),
    "echo": boolean("Put the prompt before the reply."), "suffix": nullable(STRING),
    "best_of": integer(1, 20, "Only as many as n."), "response_format": FORMATS, **EXTENSIONS, **IGNORED},
    ("model", "prompt"))

EMBEDDING_REQUEST = obj({
    "model": MODEL, "input": PROMPT,
    "encoding_format": nullable({"type": "string", "enum": ["float", "base64"]}),
    "dimensions": integer(1, INT64, "Keep so many of the first numbers, at length 1 again."),
    "pooling": nullable({"type": "string", "enum": ["mean", "last"]}), "user": nullable(STRING)}, ("model", "input"))

RESPONSE_ITEM = obj({
    "type": nullable({"type": "string", "enum": ["message", "function_call", "function_call_output", "reasoning"]}),
    "role": {"type": "string", "enum": ["system", "developer", "user", "assistant"]}, "content": CONTENT,
    "name": STRING, "arguments": STRING, "call_id": STRING, "output": CONTENT, "id": nullable(STRING),
    "status": nullable(STRING)}, closed=False)

RESPONSE_REQUEST = obj({
    "model": MODEL,
    "input": {"anyOf": [STRING, {"type": "array", "minItems": 1, "items": RESPONSE_ITEM}]},
    "instructions": nullable(STRING), "previous_response_id": nullable(STRING),
    "max_output_tokens": integer(1, INT64, "Most tokens of the reply."),
    "temperature": SAMPLING["temperature"], "top_p": SAMPLING["top_p"], "seed": SAMPLING["seed"],
    "stop": SAMPLING["stop"], "logit_bias": SAMPLING["logit_bias"],
    "presence_penalty": SAMPLING["presence_penalty"], "frequency_penalty": SAMPLING["frequency_penalty"],
    "top_logprobs": integer(0, 20, "Report log-probabilities of so many of the likeliest tokens."),
    "include": nullable({"type": "array", "items": STRING}),
    "stream": boolean("Server-sent events."),
    "stream_options": nullable(obj({"include_obfuscation": boolean("Taken, and without effect.")})),
    "text": nullable(obj({"format": {"anyOf": [
        obj({"type": {"type": "string", "enum": ["text", "json_object"]}}, ("type",), closed=False),
        obj({"type": {"type": "string", "enum": ["json_schema"]}, "name": STRING, "description": nullable(STRING),
             "schema": {"type": ["object", "boolean"]}, "strict": boolean("See chat completions.")},
            ("type", "schema")), {"type": "null"}]}, "verbosity": nullable(STRING)})),
    "tools": nullable({"type": "array", "maxItems": 128, "items": ref("ResponseTool")}),
    "tool_choice": {"anyOf": [
        {"type": "string", "enum": ["none", "auto", "required"]},
        obj({"type": {"type": "string", "enum": ["function"]}, "name": STRING}, ("type", "name")), {"type": "null"}]},
    "parallel_tool_calls": boolean("False: at most one call."),
    "background": nullable({"type": "boolean", "enum": [False]}),
    "reasoning": nullable(ANY_OBJECT), "truncation": nullable({"type": "string", "enum": ["disabled"]}),
    "chat_template_kwargs": nullable(ANY_OBJECT), **EXTENSIONS, **IGNORED}, ("model", "input"))
