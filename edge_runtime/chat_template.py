"""Messages to the one text that a model was trained on: its own Jinja template, rendered as Hugging Face does."""
from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import ChatTemplateError, InvalidRequestError

if TYPE_CHECKING:
    from jinja2 import Template

    from edge_runtime.template_sandbox import BoundedEnvironment
    from edge_runtime.tokenizer import Tokenizer

KEY = "tokenizer.chat_template"
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
MAX_SOURCE = 1 << 20  # characters; the longest template in use has 20,000
TIME_LIMIT = 2.0  # seconds of CPU time; real templates take milliseconds
_CONTINUED = "\ue0f1continued\ue0f1"  # marks the end of a message that is continued; no text has it
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """One model's chat template, and its named variants (`tool_use`, `rag` ...).

    source: Jinja text; special_tokens: further names that the template may use, such as unk_token or pad_token.
    Compiled on first use. Safe from many threads.
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "",
                 special_tokens: Mapping[str, str] | None = None, named: Mapping[str, ChatTemplate] | None = None,
                 time_limit: float = TIME_LIMIT):
        if not isinstance(source, str) or not source.strip():
            raise ChatTemplateError("The chat template is empty. Pass a template of your own, or use generate() "
                                    "with a prompt written out.")
        if len(source) > MAX_SOURCE:
            raise ChatTemplateError(f"The chat template has {len(source)} characters, the limit is {MAX_SOURCE}.")
        self.source = source
        self.bos_token, self.eos_token = bos_token, eos_token
        self.special_tokens = dict(special_tokens or {})
        self.named = dict(named or {})
        self.time_limit = time_limit
        self._lock = threading.Lock()

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], tokenizer: Tokenizer) -> ChatTemplate:
        """The templates of a model file: `tokenizer.chat_template`, and those that `tokenizer.chat_templates` names.

        Raises ChatTemplateError where the file has none.
        """
        tokens = {name: tokenizer.token_text(i) for name, i in (
            ("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id), ("unk_token", tokenizer.unk_id),
            ("pad_token", tokenizer.pad_id)) if i is not None}
        bos, eos = tokens.pop("bos_token", ""), tokens.pop("eos_token", "")
        sources = {}
        for key, value in metadata.items():
            if key == KEY or key.startswith(KEY + "."):
                value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
                if not isinstance(value, str):
                    raise ChatTemplateError(f"{key} is {type(value).__name__}, must be a string. Export the file "
                                            f"again.")
                if value.strip():
                    sources[key[len(KEY) + 1:] or "default"] = value
        named = {name: cls(source, bos_token=bos, eos_token=eos, special_tokens=tokens)
                 for name, source in sources.items()}
        if "default" not in named:
            have = f" (only one named {', '.join(map(repr, sorted(named)))})" if named else ""
            raise ChatTemplateError(f"The model file has no chat template{have}: it may be a base model. Pass a "
                                    f"template of your own, or use generate() with a prompt written out.")
        default = named.pop("default")
        default.named.update(named)
        return default

    def render(self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None,
               add_generation_prompt: bool = True, continue_final_message: bool = False, name: str | None = None,
               **extra: Any) -> str:
        """The prompt for `messages`, with the opening of the reply where `add_generation_prompt`, or ending inside the
        last message where `continue_final_message`, for a reply that was broken off.

        messages: dicts with `role` (one of ROLES) and `content`, a string or a list of `{"type": "text", "text":
        ...}`; a message with `tool_calls` needs no content. tools: JSON schemas; a variant named `tool_use` is taken
        where there is one. name: a named variant. extra: variables of the template, such as enable_thinking.
        Raises InvalidRequestError for malformed messages, ChatTemplateError where the template refuses them, is
        broken, or uses more time or memory than a template may.
        """
        variant = self._variant(name, bool(tools))
        if variant is not self:
            return variant.render(messages, tools=tools, add_generation_prompt=add_generation_prompt,
                                  continue_final_message=continue_final_message, **extra)
        chat = checked_messages(messages)
        if continue_final_message:
            add_generation_prompt = False
            chat = _with_text_parts_joined(chat)
            chat[-1]["content"] = (chat[-1].get("content") or "") + _CONTINUED
        schemas = _checked_tools(tools)
        if schemas and "tools" not in self.variables:
            raise ChatTemplateError("The model's chat template does not know tools. Leave out `tools`, or describe "
                                    "them in the system message.")
        if not self._reads_parts:
            chat = [_with_text(m) for m in chat]
        variables: dict[str, Any] = {
            **self.special_tokens, "bos_token": self.bos_token, "eos_token": self.eos_token,
            **{k: _plain(v) for k, v in extra.items()}, "messages": chat, "tools": schemas,
            "add_generation_prompt": add_generation_prompt}
        variables.setdefault("documents", None)
        template, environment = self._compiled
        limit = (4 << 20) + 8 * _size(variables)
        # The clock of a large conversation runs longer: about 1 MB of text per second is slow already.
        seconds = self.time_limit + limit / (64 << 20)
        text: str = self._run(lambda: environment.render(template, variables), environment, seconds, limit)
        if not continue_final_message:
            return text
        end = text.rfind(_CONTINUED)
        if end < 0:
            raise ChatTemplateError("The model's chat template leaves the last message out, so it cannot be continued. "
                                    "Ask for a new reply.")
        return text[:end]

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names that the template reads and does not set."""
        from jinja2 import meta

        return frozenset(meta.find_undeclared_variables(self._tree))

    @cached_property
    def _environment(self) -> BoundedEnvironment:
        from edge_runtime.template_sandbox import BoundedEnvironment

        return BoundedEnvironment()

    @cached_property
    def _tree(self) -> Any:
        return self._run(lambda: self._environment.parse(self.source), self._environment, self.time_limit, 1 << 20)

    @cached_property
    def _compiled(self) -> tuple[Template, BoundedEnvironment]:
        environment = self._environment
        with self._lock:
            template = self._run(lambda: environment.from_string(self.source), environment, self.time_limit, 1 << 20)
        return template, environment

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether the template looks into lists of parts itself; where not, it gets their text joined."""
        from jinja2 import nodes

        words = {n.value for n in self._tree.find_all(nodes.Const) if isinstance(n.value, str)}
        words |= {n.attr for n in self._tree.find_all(nodes.Getattr)}
        return {"type", "text"} <= words

    def _variant(self, name: str | None, tools: bool) -> ChatTemplate:
        if name is None:
            return self.named.get("tool_use", self) if tools else self
        if name == "default":
            return self
        if not isinstance(name, str) or name not in self.named:
            raise ChatTemplateError(f"The model has no chat template named {name!r} (it has: "
                                    f"{', '.join(['default', *sorted(self.named)])}).")
        return self.named[name]

    def _run(self, work: Any, environment: BoundedEnvironment, seconds: float, limit: int) -> Any:
        from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError

        try:
            with environment.bounded(seconds, limit):
                return work()
        except TemplateSyntaxError as e:
            raise ChatTemplateError(f"The model's chat template is broken: line {e.lineno}: {e.message}") from e
        except SecurityError as e:
            raise ChatTemplateError(f"The model's chat template was stopped: {e}") from e
        except TemplateError as e:
            raise ChatTemplateError(f"The model's chat template refused the messages: {e}") from e
        except RecursionError as e:
            raise ChatTemplateError("The model's chat template was stopped: it nests without end") from e
        except Exception as e:  # whatever a template's expressions can raise
            raise ChatTemplateError(f"The model's chat template failed: {type(e).__name__}: {e}") from e


def encode_chat(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a rendered chat: special tokens in it are read as such, and it begins with exactly one BOS where the
    tokenizer asks for one, whether or not the template wrote it."""
    ids = tokenizer.encode(text, add_special=False, parse_special=True)
    bos = tokenizer.bos_id
    if tokenizer.add_bos and bos is not None:
        while len(ids) >= 2 and ids[0] == ids[1] == bos:
            del ids[0]
        if not ids or ids[0] != bos:
            ids.insert(0, bos)
    return ids


def checked_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of `messages` made of plain values. Raises InvalidRequestError naming the message that is malformed."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidRequestError("messages", messages, "a list of messages with role and content")
    if not messages:
        raise InvalidRequestError("messages", messages, "at least one message")
    out = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise InvalidRequestError(where, message, "a dict with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise InvalidRequestError(f"{where}.role", role, f"one of {', '.join(ROLES)}")
        if isinstance(content, (list, tuple)):
            for j, part in enumerate(content):
                if not (isinstance(part, Mapping) and part.get("type") == "text"
                        and isinstance(part.get("text"), str)):
                    raise InvalidRequestError(f"{where}.content[{j}]", part, '{"type": "text", "text": a string}')
        elif content is None:
            if not message.get("tool_calls"):
                raise InvalidRequestError(f"{where}.content", content, "a string or a list of text parts")
        elif not isinstance(content, str):
            raise InvalidRequestError(f"{where}.content", content, "a string or a list of text parts")
        plain = _plain(dict(message))
        reasoning = next((plain[k] for k in _REASONING if plain.get(k) is not None), None)
        if reasoning is not None:  # templates read one name or the other
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        out.append(plain)
    return out


def _with_text_parts_joined(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [*chat[:-1], _with_text(chat[-1])]


def _with_text(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list):
        return {**message, "content": "\n".join(part["text"] for part in content)}
    return message


def _checked_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[Any] | None:
    if tools is None:
        return None
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise InvalidRequestError("tools", tools, "a list of JSON schemas")
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise InvalidRequestError(f"tools[{i}]", tool, "a JSON schema (a dict)")
    plain: list[Any] = _plain(list(tools))
    return plain


def _plain(value: Any, depth: int = 0) -> Any:
    """`value` rebuilt from JSON's types, so that no object with methods of its own reaches a template."""
    if depth > 64:
        raise InvalidRequestError("messages", value, "nested at most 64 deep")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(k, depth + 1): _plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, depth + 1) for v in value]
    if hasattr(value, "item") and getattr(value, "shape", None) == ():  # NumPy scalars
        return _plain(value.item(), depth + 1)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    raise InvalidRequestError("messages", value, f"made of JSON values, not {type(value).__name__}")


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_size(k) + _size(v) + 1 for k, v in value.items())
    if isinstance(value, list):
        return sum(_size(v) + 1 for v in value)
    return 1
