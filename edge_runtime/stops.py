"""Stop strings in a stream of text: found across token borders, never emitted, held back no longer than needed."""
from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import lru_cache


class _Automaton:
    """Aho-Corasick: after any text, its state is the longest suffix that begins a stop string."""

    def __init__(self, stops: Sequence[str]):
        self.next: list[dict[str, int]] = [{}]
        self.fail = [0]
        self.depth = [0]  # characters to hold back in this state
        self.match = [0]  # length of the longest stop string that ends here, 0 for none
        for stop in stops:
            state = 0
            for char in stop:
                if char not in self.next[state]:
                    self.next[state][char] = len(self.next)
                    self.next.append({})
                    self.fail.append(0)
                    self.depth.append(self.depth[state] + 1)
                    self.match.append(0)
                state = self.next[state][char]
            self.match[state] = len(stop)
        queue = deque(self.next[0].values())
        while queue:
            state = queue.popleft()
            for char, child in self.next[state].items():
                self.fail[child] = self.step(self.fail[state], char)
                self.match[child] = self.match[child] or self.match[self.fail[child]]
                queue.append(child)

    def step(self, state: int, char: str) -> int:
        while state and char not in self.next[state]:
            state = self.fail[state]
        return self.next[state].get(char, 0)


_cached = lru_cache(maxsize=64)(_Automaton)  # a server's requests share their stop strings
CACHED_CHARACTERS = 4096  # of stop strings together; an automaton takes 280 bytes for each


def _automaton(stops: tuple[str, ...]) -> _Automaton:
    return (_cached if sum(map(len, stops)) <= CACHED_CHARACTERS else _Automaton)(stops)


class StopMatcher:
    """Text passes through `push`; the stop string that ends first ends the text before it."""

    def __init__(self, stops: Sequence[str] = ()):
        self._automaton = _automaton(tuple(stops)) if stops else None
        self._state = 0
        self._held = ""
        self.stop: str | None = None  # the stop string that was found

    def push(self, text: str) -> str:
        """The text that can be shown now. After a stop string was found, nothing more comes."""
        if self._automaton is None:
            return text
        if self.stop is not None:
            return ""
        seen, machine, state = self._held + text, self._automaton, self._state
        for index in range(len(self._held), len(seen)):
            state = machine.step(state, seen[index])
            found = machine.match[state]
            if found:
                end = index + 1
                self.stop, self._held = seen[end - found:end], ""
                return seen[:end - found]
        self._state = state
        cut = len(seen) - machine.depth[state]
        self._held = seen[cut:]
        return seen[:cut]

    def flush(self) -> str:
        """The text held back, at the end of a reply in which no stop string came."""
        held, self._held, self._state = self._held, "", 0
        return held
