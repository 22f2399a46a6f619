"""How much of a document survives in the model's summary, on documents that training never saw.

`python -m edge_runtime.models.recipes.evaluate MODEL.gguf [--documents 240] [--split held_out] [--perplexity]`.
Summaries are greedy, through the runtime itself or through llama.cpp (`--engine llama.cpp`); any callable from prompts
to replies will do in `evaluate`.
"""
from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import random
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from tokenizers import AddedToken, Tokenizer, models

from edge_runtime.models.bundled import UNKNOWN_ANSWER, question_prompt, summarize_prompt
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.reference import ReferenceModel

from .bpe import SPECIAL_TOKENS, encode_turns, with_pipeline
from .corpus import Turn, document_at
from .documents import Document, make_register

EVALUATION_SEED = 7  # the splits share no documents; the seed only fixes which held-out ones are asked
QUESTIONS_PER_DOCUMENT = 3
_NAMES = {"train": False, "held_out": None, "novel": True}  # see `slots.Names`
MAX_TOKENS = 320

# Rendered prompts in, greedy replies out, in order.
Generate = Callable[[Sequence[str], int], list[str]]
# Names, numbers, dates, amounts: what a summary must not invent.
_HARD_WORD = re.compile(r"\d[\d.,:%/-]*\d|\d|[A-Z][a-z]+")


@dataclass(frozen=True)
class Score:
    """Shares are between 0 and 1. facts_kept: of all key facts, those that occur in the summary. exact_summaries: equal
    to the reference. grounded: of the names and numbers in the summaries, those that occur in the document.
    answers_exact: of the answerable questions; unknown_right: of the unanswerable ones; sums_exact: of those that ask
    for a sum, which answers_exact counts too; lookups_exact: of questions about lists, unanswerable ones included."""

    documents: int
    facts: int
    facts_kept: float
    documents_with_all_facts: float
    exact_summaries: float
    grounded: float
    questions: int
    answers_exact: float
    unknown_right: float
    sums: int
    sums_exact: float
    lookups: int
    lookups_exact: float
    seconds: float
    facts_kept_by_kind: dict[str, float]
    bad: list[dict[str, object]] = field(default_factory=list)


def chat_prompt(user: str) -> str:
    """The chat template's text for one user message that waits for its reply."""
    return f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


def kept_facts(document: Document, summary: str) -> list[bool]:
    folded = summary.casefold()
    return [fact.casefold() in folded for fact in document.facts]


def grounded_words(document: Document, summary: str) -> list[bool]:
    """For each name and number of a summary, sentence openings aside, whether the document has it."""
    words = re.sub(r"(?:^|[.!?\n-] +|\n)([A-Z])", lambda m: m.group(0).lower(), summary)
    text = document.text.casefold()
    return [word.casefold() in text for word in _HARD_WORD.findall(words)]


def evaluate(generate: Generate, split: str = "held_out", count: int = 240, seed: int = EVALUATION_SEED,
             show: int = 5) -> Score:
    """Scores `count` documents of a split (`held_out`, or `novel`: only names that training never drew).

    show: how many of the worst summaries the score carries along.
    """
    documents = [document_at(split, seed, index) for index in range(count)]
    began = time.perf_counter()
    summaries = generate([chat_prompt(summarize_prompt(d.text)) for d in documents], MAX_TOKENS)
    asked = [(d, q, a) for d in documents for q, a in d.questions[:QUESTIONS_PER_DOCUMENT]]
    replies = generate([chat_prompt(question_prompt(d.text, q)) for d, q, _ in asked], 48)
    lists = [make_register(random.Random(f"{split}/{seed}/list/{index}"), _NAMES[split])
             for index in range(-(-count // 4))]
    looked_up = [(d, q, a) for d in lists for q, a in d.questions[:QUESTIONS_PER_DOCUMENT]]
    found = generate([chat_prompt(question_prompt(d.text, q)) for d, q, _ in looked_up], 48)
    seconds = time.perf_counter() - began
    kept = [kept_facts(d, s) for d, s in zip(documents, summaries)]
    grounded = [hit for d, s in zip(documents, summaries) for hit in grounded_words(d, s)]
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for d, hits in zip(documents, kept):
        by_kind[d.kind] += hits
    known = [reply.strip() == a for (_, _, a), reply in zip(asked, replies) if a != UNKNOWN_ANSWER]
    unknown = [reply.strip() == a for (_, _, a), reply in zip(asked, replies) if a == UNKNOWN_ANSWER]
    sums = [reply.strip() == a for (_, _, a), reply in zip(asked, replies) if "=" in a]
    worst = sorted(range(count), key=lambda i: float(np.mean(kept[i])))[:show]
    bad: list[dict[str, object]] = [
        {"text": documents[i].text, "summary": summaries[i], "reference": documents[i].summary,
         "lost": [f for f, hit in zip(documents[i].facts, kept[i]) if not hit]} for i in worst if not all(kept[i])]
    wrong = [i for i, ((_, _, a), reply) in enumerate(zip(asked, replies)) if reply.strip() != a][:show]
    bad += [{"text": asked[i][0].text, "question": asked[i][1], "answer": replies[i], "reference": asked[i][2]}
            for i in wrong]
    return Score(
        documents=count, facts=sum(map(len, kept)), facts_kept=_share([h for hits in kept for h in hits]),
        documents_with_all_facts=_share([all(hits) for hits in kept]),
        exact_summaries=_share([s.strip() == d.summary for d, s in zip(documents, summaries)]),
        grounded=_share(grounded), questions=len(asked), answers_exact=_share(known), unknown_right=_share(unknown),
        sums=len(sums), sums_exact=_share(sums), lookups=len(looked_up),
        lookups_exact=_share([reply.strip() == a for (_, _, a), reply in zip(looked_up, found)]),
        seconds=round(seconds, 1), facts_kept_by_kind={k: _share(v) for k, v in sorted(by_kind.items())},
        bad=bad)


def _share(hits: Sequence[bool]) -> float:
    return round(float(np.mean(hits)), 4) if hits else 0.0


def perplexity(path: pathlib.Path, split: str = "held_out", count: int = 60,
               seed: int = EVALUATION_SEED) -> dict[str, float]:
    """Perplexity per token of the file's weights, dequantized, in the float32 reference: of reference summaries given
    their documents, and of whole conversations."""
    with GGUFFile(path) as file:
        model, tokenizer = ReferenceModel.load(file), file_tokenizer(file)
    spoken, everything = [], []
    for index in range(count):
        document = document_at(split, seed, index)
        ids, said = encode_turns(tokenizer, [Turn("user", summarize_prompt(document.text)),
                                             Turn("assistant", document.summary)])
        logits = model.forward(ids[:-1]).astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses = -log_probabilities[np.arange(len(ids) - 1), ids[1:]]
        everything.append(losses)
        spoken.append(losses[np.array(said[1:])])
    return {"summaries": round(float(np.exp(np.concatenate(spoken).mean())), 4),
            "all_text": round(float(np.exp(np.concatenate(everything).mean())), 4)}


def file_tokenizer(file: GGUFFile) -> Tokenizer:
    """The file's tokenizer rebuilt on the `tokenizers` library."""
    tokens, merges = file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.merges"]
    vocabulary = {str(token): i for i, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (str(merge).partition(" ") for merge in merges)]
    tokenizer = with_pipeline(Tokenizer(models.BPE(vocabulary, pairs)))
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    return tokenizer


def generator(engine: str, path: pathlib.Path, threads: int) -> Generate:
    """engine "edge": this runtime; "llama.cpp": llama-cpp-python (extra `llamacpp`)."""
    if engine == "llama.cpp":
        from .llama_cpp_generate import llama_cpp_generator

        return llama_cpp_generator(path, threads)
    # Resolved by name: the engine stands above this room, which only a person at the command line may overlook.
    edge_runtime = importlib.import_module("edge_runtime")
    llm = edge_runtime.LLM(str(path), threads=threads)

    def generate(prompts: Sequence[str], max_tokens: int) -> list[str]:
        return [reply.text for reply in llm.generate(list(prompts), max_tokens=max_tokens, temperature=0.0)]

    return generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--engine", choices=("edge", "llama.cpp"), default="edge")
    parser.add_argument("--split", choices=("held_out", "novel", "train"), default="held_out")
    parser.add_argument("--documents", type=int, default=240)
    parser.add_argument("--seed", type=int, default=EVALUATION_SEED)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--show", type=int, default=5, help="worst summaries and wrong answers to print")
    parser.add_argument("--perplexity", action="store_true", help="also the perplexity in the float reference")
    options = parser.parse_args()
    score = evaluate(generator(options.engine, options.model, options.threads), options.split, options.documents,
                     options.seed, options.show)
    result = asdict(score)
    if options.perplexity:
        result["perplexity"] = perplexity(options.model, options.split, seed=options.seed)
    print(json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
