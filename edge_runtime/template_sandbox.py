"""A Jinja environment for templates that nobody vouched for: what Hugging Face offers chat templates, with bounds.

Jinja's sandbox keeps a template from the interpreter's insides. It does not keep it from filling the memory or from
running forever inside one C call, so here every value that a template builds is weighed before or just after it is
made, and loops, calls and filters look at the clock.
"""
from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import Template, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_MAX_INT_BITS = 4096
_ITEM = 8  # characters that an item of a list counts for beside its own: a pointer and its object's head
_MAX_PADDING = 100_000  # the range() limit of Jinja's sandbox, for widths and counts too
_WIDE = re.compile(r"\d{6,}")
_NESTED_FIELD = re.compile(r":[^{}]*\{")
_REMOVED_FILTERS = ("pprint", "urlize", "wordwrap")  # slower than their input is long
_COUNTED_FILTERS = frozenset(("batch", "center", "indent", "round", "slice", "tojson", "truncate"))


@dataclass
class _Meter:
    """What one rendering may use: deadline in seconds of this thread's CPU time, limit in characters or items."""

    deadline: float
    limit: int

    def check_time(self) -> None:
        if time.thread_time() > self.deadline:
            raise SecurityError("it runs longer than its time limit")

    def check_size(self, size: int) -> None:
        if size > self.limit:
            raise SecurityError(f"it builds a value larger than {self.limit} characters")

    def weigh(self, value: Any) -> int:
        """Size of `value` counted through all its items. Raises SecurityError where it is larger than the limit."""
        if isinstance(value, str):
            self.check_size(len(value))
            return len(value)
        if isinstance(value, int) and value.bit_length() > _MAX_INT_BITS:
            raise SecurityError(f"it builds a number of more than {_MAX_INT_BITS} bits")
        total, stack = 0, [value]
        while stack:
            item = stack.pop()
            if isinstance(item, str):
                total += len(item)
            elif isinstance(item, dict):
                stack.extend(item.keys())
                stack.extend(item.values())
            elif isinstance(item, (list, tuple, set, frozenset)):
                stack.extend(item)
            total += _ITEM
            if total > self.limit:
                self.check_size(total)
        return total

    def iterate(self, values: Iterator[Any]) -> Iterator[Any]:
        """`values`, stopped where together they are larger than the limit, whoever collects them."""
        total = 0
        for value in values:
            self.check_time()
            total += self.weigh(value)
            self.check_size(total)
            yield value


class _GenerationTag(Extension):
    """`{% generation %}` marks what training computes its loss on; rendering passes it through."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _MeteredCode(CodeGenerator):
    """Generated code that looks at the clock in every block and weighs every literal container and `~`."""

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        self.writeline("environment.check_time()")
        super().blockvisit(nodes, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.join_values(context.eval_ctx.autoescape, (")
        for arg in node.nodes:
            self.visit(arg, frame)
            self.write(", ")
        self.write("))")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx != "load":
            super().visit_Tuple(node, frame)
            return
        self.write("environment.weigh(")
        super().visit_Tuple(node, frame)
        self.write(")")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self.write("environment.weigh(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self.write("environment.weigh(")
        super().visit_Dict(node, frame)
        self.write(")")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Hugging Face's environment for chat templates, metered. Templates are compiled and rendered inside `bounded`."""

    code_generator_class = _MeteredCode
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        self._local = threading.local()
        self.filters["tojson"] = _tojson
        for name in _REMOVED_FILTERS:
            del self.filters[name]
        self.filters = {name: self._metered_filter(name, f) for name, f in self.filters.items()}
        tests: dict[str, Any] = dict(self.tests)
        self.tests = {name: self._metered_test(f) for name, f in tests.items()}
        del self.globals["lipsum"]
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_TemplateDict(),
                            namespace=_TemplateNamespace)

    @contextmanager
    def bounded(self, seconds: float, limit: int) -> Iterator[None]:
        """Within, this thread's template may use `seconds` of CPU time and build values of `limit` characters."""
        before = getattr(self._local, "meter", None)
        self._local.meter = _Meter(time.thread_time() + seconds, limit)
        try:
            yield
        finally:
            self._local.meter = before

    @property
    def _meter(self) -> _Meter:
        meter: _Meter = self._local.meter
        return meter

    def render(self, template: Template, variables: dict[str, Any]) -> str:
        """The text of `template`, at most the limit of `bounded` long."""
        out, size = [], 0
        meter = self._meter
        for piece in template.generate(variables):
            size += len(piece)
            meter.check_size(size)
            out.append(piece)
        return "".join(out)

    # What generated code calls

    def check_time(self) -> None:
        self._meter.check_time()

    def weigh(self, value: Any) -> Any:
        self._meter.weigh(value)
        return value

    def join_values(self, autoescape: bool, values: tuple[Any, ...]) -> str:
        self._meter.check_size(sum(len(v) for v in values if isinstance(v, str)))
        self._meter.check_time()
        return markup_join(values) if autoescape else str_join(values)

    def concat(self, pieces: Iterable[str]) -> str:
        pieces = list(pieces)
        self._meter.check_size(sum(map(len, pieces)))
        return "".join(pieces)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = self._meter
        meter.check_time()
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "**":
            if numbers and left.bit_length() * abs(right) > _MAX_INT_BITS:
                raise SecurityError(f"it builds a number of more than {_MAX_INT_BITS} bits")
        elif operator == "*" and not numbers:
            for sequence, count in ((left, right), (right, left)):
                if isinstance(sequence, (str, list, tuple)) and isinstance(count, int):
                    meter.check_size(len(sequence) * max(count, 0))
        elif operator == "+" and isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
            meter.check_size(len(left) + len(right))
        elif operator == "%" and isinstance(left, str):
            _check_format(left, right if isinstance(right, tuple) else (right,))
        return self.weigh(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = __self._meter
        meter.check_time()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            _check_str_method(meter, owner, getattr(__obj, "__name__", ""), args, kwargs)
        return __self.weigh(super().call(__context, __obj, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, (bytes, bytearray)) or (isinstance(obj, int) and attr in ("to_bytes", "from_bytes")):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None and (_WIDE.search(value.__self__) or _NESTED_FIELD.search(value.__self__)):
            raise SecurityError("it formats text to a width that is too large or computed")
        return wrapped

    def _metered_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        skipped = 2 if hasattr(function, "jinja_pass_arg") else 1

        @functools.wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            meter = self._meter
            meter.check_time()
            value, options = args[skipped - 1] if len(args) >= skipped else None, (*args[skipped:], *kwargs.values())
            if name in _COUNTED_FILTERS:
                _check_padding(meter, name, value, options)
            elif name == "replace":
                _check_str_method(meter, str(value), "replace", options, {})
            elif name == "join":
                value = list(meter.iterate(iter(value or ())))
                glue = max((len(o) for o in options if isinstance(o, str)), default=0)
                meter.check_size(len(value) * glue)
                args = (*args[:skipped - 1], value, *args[skipped:])
            elif name == "format":
                _check_format(str(value), options)
            elif name == "sum" and any(not isinstance(o, (int, float, str)) for o in options):
                raise SecurityError("it sums what are no numbers")
            result = function(*args, **kwargs)
            return meter.iterate(result) if isinstance(result, Iterator) else self.weigh(result)

        return metered

    def _metered_test(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            self._meter.check_time()
            return function(*args, **kwargs)

        return metered


def _check_padding(meter: _Meter, name: str, value: Any, options: tuple[Any, ...]) -> None:
    widest = 0
    for option in options:
        size = len(option) if isinstance(option, str) else abs(option) if isinstance(option, int) else 0
        widest = max(widest, size)
    if widest > _MAX_PADDING or (name == "round" and widest > 300):
        raise SecurityError(f"it pads or repeats by {widest}")
    if name == "indent":
        meter.check_size((str(value).count("\n") + 1) * widest)
    elif name == "tojson" and widest > 64:
        raise SecurityError(f"it indents JSON by {widest}")


def _check_format(text: str, values: tuple[Any, ...]) -> None:
    if _WIDE.search(text) or ("*" in text and any(isinstance(v, int) and abs(v) > _MAX_PADDING for v in values)):
        raise SecurityError("it formats text to a width that is too large")


def _check_str_method(meter: _Meter, text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Bounds the size of what a method of str would build."""
    args = (*args, *kwargs.values())
    if name in ("center", "ljust", "rjust", "zfill"):
        meter.check_size(max((a for a in args if isinstance(a, int)), default=0))
    elif name == "expandtabs":
        meter.check_size((text.count("\t") + 1) * max((a for a in args if isinstance(a, int)), default=8))
    elif name == "replace" and len(args) >= 2:
        old, new = str(args[0]), str(args[1])
        meter.check_size(len(text) + text.count(old) * len(new))
    elif name == "join" and args:
        if isinstance(args[0], (list, tuple, dict)):
            meter.check_size(len(args[0]) * len(text))
            meter.weigh(args[0])
        elif not isinstance(args[0], str):
            raise SecurityError("it joins what is no list")
        else:
            meter.check_size(len(args[0]) * (len(text) + 1))
    elif name == "translate":
        raise SecurityError("it calls str.translate")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(x: Any, ensure_ascii: bool = False, indent: int | str | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """JSON without Jinja's escapes for HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format[:1000])


class _TemplateDict:
    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _TemplateNamespace(Namespace):
    """A namespace whose attributes cannot reach Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        Namespace.__setitem__(self, name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"it stores {name!r} on a namespace")
