"""How far a model's distribution is from a teacher's on held-out conversations.

`python -m edge_runtime.models.recipes.divergence --teacher T --student S --control C [--documents 100]`; each is a
training folder or a GGUF file that computes in float32. A conversation is a summary and two questions.
"""
from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edge_runtime.models.bundled import FOLLOW_UP_PROMPT, summarize_prompt
from edge_runtime.models.gguf_file import GGUFFile
from edge_runtime.models.reference import ReferenceModel

from .bpe import encode_turns
from .corpus import Turn, document_at
from .evaluate import EVALUATION_SEED, file_tokenizer

FOLLOW_UPS = 2

# Token ids [T] in, logits float32 [T, V] out.
Predict = Callable[[Sequence[int]], np.ndarray]


@dataclass(frozen=True)
class Divergence:
    """KL(teacher || model) in nats per token and how often both have the same most likely token: of the assistant's
    tokens, and of all tokens of the conversations."""

    answers: float
    all_text: float
    answers_agreement: float
    all_agreement: float
    tokens: int


def conversation(split: str, index: int, seed: int = EVALUATION_SEED) -> list[Turn]:
    """The turns that divergence is measured on for one document."""
    document = document_at(split, seed, index)
    turns = [Turn("user", summarize_prompt(document.text)), Turn("assistant", document.summary)]
    for question, answer in document.questions[:FOLLOW_UPS]:
        turns += [Turn("user", FOLLOW_UP_PROMPT.format(question=question)), Turn("assistant", answer)]
    return turns


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 [T, V] of logits [T, V]."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def held_out_kl(models: Mapping[str, Predict], teacher: Predict, tokenizer, documents: int = 100,
                split: str = "held_out", seed: int = EVALUATION_SEED) -> dict[str, Divergence]:
    """By name, how far each model is from the teacher on the first `documents` of a split."""
    sums = {name: np.zeros(4) for name in models}
    said_count = all_count = 0
    for index in range(documents):
        ids, said = encode_turns(tokenizer, conversation(split, index, seed))
        spoken = np.array(said[1:])
        taught = log_softmax(teacher(ids[:-1]))
        said_count, all_count = said_count + int(spoken.sum()), all_count + len(spoken)
        for name, predict in models.items():
            got = log_softmax(predict(ids[:-1]))
            kl = (np.exp(taught) * (taught - got)).sum(-1)
            same = taught.argmax(-1) == got.argmax(-1)
            sums[name] += kl[spoken].sum(), kl.sum(), same[spoken].sum(), same.sum()
    return {name: Divergence(float(s[0] / said_count), float(s[1] / all_count), float(s[2] / said_count),
                             float(s[3] / all_count), all_count) for name, s in sums.items()}


def folder_predictor(folder: pathlib.Path, layers: int = 0) -> Predict:
    """The float32 network of a training folder, rounded where it was trained so; layers: left after so many, 0: all.
    Needs torch."""
    import torch
    import torch.nn.functional as F

    from .rounding import Rounding
    from .train import SCALES, load_network

    network = load_network(folder)[2]
    if (folder / SCALES).exists():
        rounding = Rounding.load(folder / SCALES)
        network.load_state_dict({name: rounding(name, value) for name, value in network.state_dict().items()})

    def predict(ids: Sequence[int]) -> np.ndarray:
        with torch.no_grad():
            states = network.residuals(torch.tensor([list(ids)]))
            hidden = network.final_norm(states[layers or len(network.blocks)])
            return F.linear(hidden, network.output_weight)[0].numpy()

    return predict


def file_predictor(path: pathlib.Path) -> Predict:
    """The reference's float32 computation of a GGUF file's weights."""
    with GGUFFile(path) as file:
        return ReferenceModel.load(file).forward


def predictor(path: pathlib.Path) -> Predict:
    return folder_predictor(path) if path.is_dir() else file_predictor(path)


def tokenizer_of(path: pathlib.Path):
    """The `tokenizers.Tokenizer` of a training folder or a GGUF file."""
    from tokenizers import Tokenizer

    if path.is_dir():
        return Tokenizer.from_file(str(path / "tokenizer.json"))
    with GGUFFile(path) as file:
        return file_tokenizer(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("teacher", "student", "control"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True, help="training folder or GGUF file")
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--split", default="held_out")
    options = parser.parse_args()
    models = {"student": predictor(options.student), "control": predictor(options.control)}
    found = held_out_kl(models, predictor(options.teacher), tokenizer_of(options.teacher), options.documents,
                        options.split)
    result: dict[str, object] = {name: vars(value) for name, value in found.items()}
    result["lower_by"] = {field: 1 - getattr(found["student"], field) / getattr(found["control"], field)
                          for field in ("answers", "all_text")}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
