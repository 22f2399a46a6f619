"""Errors that cross from one process to another."""
from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from edge_runtime import errors
from edge_runtime.errors import EdgeRuntimeError, InvalidRequestError
from edge_runtime.outcome import Reply

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, EdgeRuntimeError)]


def made(kind: type[EdgeRuntimeError]) -> EdgeRuntimeError:
    """An error with some value for everything that its constructor asks for."""
    asked = [p for p in inspect.signature(kind.__init__).parameters.values()
             if p.name != "self" and p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    return kind(*[7 if p.annotation == "int" else ("a", "b") if "Sequence" in str(p.annotation) else f"some {p.name}"
                  for p in asked])


@pytest.mark.parametrize("kind", KINDS)
def test_errors_survive_pickling_and_copying(kind):
    error = made(kind)
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is kind and str(twin) == str(error) and vars(twin) == vars(error) and twin.args == error.args


def test_replies_carry_their_errors():
    reply = Reply("", (), "error", error=InvalidRequestError("temperature", -1, "from 0 up"))
    twin = pickle.loads(pickle.dumps(reply))
    assert twin.error.parameter == "temperature" and str(twin.error) == str(reply.error)
