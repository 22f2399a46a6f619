"""The byte-level BPE of the bundled model, trained with the `tokenizers` library on the synthetic corpus."""
from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from .config import RecipeConfig
from .corpus import Turn, training_turns

# The split that GGUF and llama.cpp call "qwen2": every digit stands alone, so numbers are copied digit by digit.
PRE_TOKENIZER = "qwen2"
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, START, END)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role not in ['system', 'user', 'assistant', 'tool'] -%}"
    "{{- raise_exception('unknown role: ' + message.role) -}}"
    "{%- endif -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def _texts(config: RecipeConfig) -> Iterator[str]:
    rng = random.Random(f"tokenizer/{config.seed}")
    for _ in range(config.tokenizer_documents):
        for turn in training_turns(rng):
            yield turn.text


def with_pipeline(tokenizer: Tokenizer) -> Tokenizer:
    """Sets the pre-tokenizer and the decoder that the name `PRE_TOKENIZER` stands for."""
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(config: RecipeConfig) -> Tokenizer:
    """A tokenizer of exactly config.network.vocab_size tokens; ids 0-2 are `SPECIAL_TOKENS`, then all 256 bytes."""
    tokenizer = with_pipeline(Tokenizer(models.BPE()))
    trainer = trainers.BpeTrainer(
        vocab_size=config.network.vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(_texts(config), trainer)
    if tokenizer.get_vocab_size() != config.network.vocab_size:
        raise ValueError(f"the corpus gives {tokenizer.get_vocab_size()} tokens, not {config.network.vocab_size}: "
                         f"raise tokenizer_documents or lower vocab_size.")
    return tokenizer


def encode_turns(tokenizer: Tokenizer, turns: Sequence[Turn]) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation in the chat template's form, and for each whether the assistant says it (its
    closing `<|im_end|>` included)."""
    start, end = SPECIAL_TOKENS.index(START), SPECIAL_TOKENS.index(END)
    newline = tokenizer.encode("\n").ids
    ids: list[int] = []
    spoken: list[bool] = []
    for turn in turns:
        head = [start, *tokenizer.encode(turn.role + "\n").ids]
        body = [*tokenizer.encode(turn.text).ids, end]
        ids += head + body + newline
        spoken += [False] * len(head) + [turn.role == "assistant"] * len(body) + [False] * len(newline)
    return ids, spoken


def prompt_ids(tokenizer: Tokenizer, user: str) -> list[int]:
    """Ids of a conversation that waits for the assistant's reply to one user message."""
    ids, _ = encode_turns(tokenizer, [Turn("user", user)])
    return [*ids, SPECIAL_TOKENS.index(START), *tokenizer.encode("assistant\n").ids]
