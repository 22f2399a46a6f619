"""Text to token ids and back, as the model file's own vocabulary says."""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from itertools import groupby
from types import MappingProxyType
from typing import Any

import numpy as np

from edge_runtime.bpe import CHAR_TO_BYTE, ByteLevelBPE
from edge_runtime.errors import TokenizerError
from edge_runtime.spm import SPACE, ScoredBPE
from edge_runtime.vocabulary import BYTE, CONTROL, UNKNOWN, UNUSED, USER_DEFINED, Vocabulary

_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
_C_SPACE = " \t\n\v\f\r"


class _Spellings(dict[int, bytes]):
    """Bytes of every id seen so far; a missing one is spelled on first use."""

    def __init__(self, spell: Callable[[int], bytes]):
        super().__init__()
        self._spell = spell

    def __missing__(self, token_id: int) -> bytes:
        found = self[token_id] = self._spell(token_id)
        return found


class Tokenizer:
    """Encodes and decodes for one vocabulary. Safe from many threads: all it keeps are caches.

    Encoding gives llama.cpp's ids. Decoding gives back exactly the text that was encoded; llama.cpp's clean-up of
    spaces before punctuation is not done.
    """

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self._encoder = ScoredBPE(vocabulary) if vocabulary.model == "llama" else ByteLevelBPE(vocabulary)
        special = np.isin(vocabulary.types, (CONTROL, UNKNOWN))
        self._special = special.tobytes()
        self._bytes = _Spellings(self._spell)
        self._visible = _Spellings(lambda i: b"" if self.is_special(i) else self._bytes[i])

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """From GGUF metadata (`tokenizer.ggml.*`); arrays may be lists of str or bytes, or NumPy arrays.

        Raises TokenizerError for malformed metadata, UnsupportedModelError for an unknown tokenizer or pre-tokenizer.
        """
        return cls(Vocabulary.from_metadata(metadata))

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary.tokens)

    @property
    def bos_id(self) -> int | None:
        return self.vocabulary.bos_id

    @property
    def eos_id(self) -> int | None:
        return self.vocabulary.eos_id

    @property
    def unk_id(self) -> int | None:
        return self.vocabulary.unk_id

    @property
    def pad_id(self) -> int | None:
        return self.vocabulary.pad_id

    @property
    def eog_ids(self) -> frozenset[int]:
        """All ids that end a reply: EOS, end of turn, end of message, and those known by their text."""
        return self.vocabulary.eog_ids

    @property
    def add_bos(self) -> bool:
        return self.vocabulary.add_bos

    @property
    def add_eos(self) -> bool:
        return self.vocabulary.add_eos

    @cached_property
    def special_tokens(self) -> Mapping[str, int]:
        """Text -> id of the control tokens and the unknown token."""
        tokens = self.vocabulary.tokens
        return MappingProxyType({tokens[i]: i for i, special in enumerate(self._special) if special})

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a control token or the unknown token, which `decode` leaves out."""
        return bool(self._special[self._checked(token_id)])

    def token_text(self, token_id: int) -> str:
        """The token as the vocabulary writes it, with its stand-ins for spaces and bytes."""
        return self.vocabulary.tokens[self._checked(token_id)]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token stands for in text; a special token's are those of its name."""
        return self._bytes[token_id]

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False, *,
               start: bool = True) -> list[int]:
        """Ids of `text`.

        add_special: write BOS and EOS where the file asks for them. parse_special: read the names of control tokens
        in the text as those tokens (for rendered chat templates, not for what users typed); tokens that the file
        calls user-defined are always read. start: False for text that continues one, which gets no space of
        SentencePiece before it. Raises TokenizerError for text with lone surrogates, which is no Unicode.
        """
        _require_unicode(text)
        v = self.vocabulary
        ids = [v.bos_id] if add_special and v.add_bos and v.bos_id is not None else []
        after_special = start
        for fragment in self._fragments(text, parse_special):
            if isinstance(fragment, int):
                ids.append(fragment)
                after_special = True
            else:
                prefix = " " if v.model == "llama" and v.add_space_prefix and after_special else ""
                ids.extend(self._encode_text(prefix + fragment))
                after_special = False
        if add_special and v.add_eos and v.eos_id is not None:
            ids.append(v.eos_id)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True, *, start: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD. start: see `decode_bytes`."""
        return self.decode_bytes(ids, skip_special, start=start).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = True, *, start: bool = True) -> bytes:
        """Bytes of `ids`. start: the ids begin a text, so the space that `encode` puts before it is taken away again;
        False for ids that continue one. Raises TokenizerError for an id outside the vocabulary."""
        if not isinstance(ids, Iterable):
            raise TokenizerError(f"token ids must come in a list, got {type(ids).__name__}.")
        ids = np.atleast_1d(ids).tolist() if isinstance(ids, np.ndarray) else list(ids)
        pieces = list(map((self._visible if skip_special else self._bytes).__getitem__, ids))
        if start and self.strips_first_space:
            first = next((i for i, piece in enumerate(pieces) if piece), None)
            if first is not None and not self.is_user_defined(ids[first]):
                pieces[first] = pieces[first].removeprefix(b" ")
        return b"".join(pieces)

    def visible_bytes(self, token_id: int) -> bytes:
        """`token_bytes`, but empty for a special token."""
        return self._visible[token_id]

    @property
    def strips_first_space(self) -> bool:
        """Whether a text's first piece carries a space that belongs to the encoding, not to the text."""
        return self.vocabulary.model == "llama" and self.vocabulary.add_space_prefix

    def is_user_defined(self, token_id: int) -> bool:
        """Whether the token is one that its author added: always read in text, and part of it."""
        return bool(self.vocabulary.types[self._checked(token_id)] == USER_DEFINED)

    def _checked(self, token_id: int) -> int:
        if isinstance(token_id, (bool, np.bool_)) or not isinstance(token_id, (int, np.integer)):
            raise TokenizerError(f"token id {token_id!r} is not an integer.")
        if not 0 <= token_id < self.vocab_size:
            raise TokenizerError(f"token id {token_id} is outside the vocabulary: ids are 0 to "
                                 f"{self.vocab_size - 1}.")
        return int(token_id)

    def _spell(self, token_id: int) -> bytes:
        token_id = self._checked(token_id)
        text, kind = self.vocabulary.tokens[token_id], self.vocabulary.types[token_id]
        raw = text.encode("utf-8", "surrogateescape")
        if kind in (CONTROL, UNKNOWN, USER_DEFINED):
            return raw
        if kind == UNUSED:  # padding of the vocabulary
            return b""
        if kind == BYTE:
            return bytes([_byte_value(text)])
        if self.vocabulary.model == "llama":
            return raw.replace(SPACE.encode(), b" ")
        try:
            return bytes(map(CHAR_TO_BYTE.__getitem__, text))
        except KeyError:  # a token stored as plain text, like those added after training
            return raw

    def _encode_text(self, text: str) -> list[int]:
        try:
            return self._encoder.encode(text)
        except BaseException as e:
            # A panic of the Rust library is no Exception; its regex engine gives up on some texts of 10 MB and more.
            if type(e).__name__ != "PanicException":
                raise
            raise TokenizerError(f"text of {len(text)} characters cannot be cut into words: {e}. Pass it in "
                                 f"parts.") from None

    @cached_property
    def _added(self) -> dict[bool, list[tuple[str, list[tuple[str, int]]]]]:
        """For parse_special off and on: the tokens that are read as a whole, longest first, those with the same
        first characters together."""
        tokens, types = self.vocabulary.tokens, self.vocabulary.types
        out = {}
        for parse, kinds in ((False, (USER_DEFINED,)), (True, (USER_DEFINED, CONTROL, UNKNOWN))):
            found = [(tokens[i], i) for i in np.flatnonzero(np.isin(types, kinds)).tolist()]
            found.sort(key=lambda t: -len(t[0].encode("utf-8", "surrogateescape")))
            out[parse] = [(stem, list(group)) for stem, group in groupby(found, lambda t: t[0][:3])]
        return out

    def _fragments(self, text: str, parse_special: bool) -> list[str | int]:
        """`text` cut at whole tokens: the longest token takes its places first, then the next."""
        fragments: list[str | int] = [text] if text else []
        absent: dict[str, bool] = {}
        for stem, group in self._added[parse_special]:
            if stem not in absent:
                absent[stem] = stem not in text
            if absent[stem]:
                continue
            for name, token_id in group:
                if name in text:
                    fragments = list(self._cut(fragments, name, token_id))
        return fragments

    def _cut(self, fragments: list[str | int], name: str, token_id: int) -> Iterable[str | int]:
        rstrip = self.vocabulary.strip_after_special and name not in ("<unk>", "<s>", "<|endoftext|>")
        for fragment in fragments:
            if isinstance(fragment, int) or name not in fragment:
                yield fragment
                continue
            for i, part in enumerate(fragment.split(name)):
                if i:
                    yield token_id
                    part = part.lstrip(_C_SPACE) if rstrip else part
                if part:
                    yield part


def _require_unicode(text: str) -> None:
    if not isinstance(text, str):
        raise TokenizerError(f"text must be str, got {type(text).__name__}.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise TokenizerError(f"text holds the lone surrogate U+{ord(text[e.start]):04X} at character {e.start}, "
                             f"which is no Unicode. Read the file as UTF-8, or pass errors='replace'.") from None


def _byte_value(text: str) -> int:
    if not _BYTE_TOKEN.fullmatch(text):
        raise TokenizerError(f"byte token {text[:40]!r} must be written <0x00> to <0xFF>. Export the file again.")
    return int(text[3:5], 16)
