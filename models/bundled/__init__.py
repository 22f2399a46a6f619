"""The model that ships with the package, and the prompts it was trained on. Imports nothing heavy."""
from __future__ import annotations

import pathlib
from importlib import resources

FILE_NAME = "edge-tiny-q4_0.gguf"

SUMMARIZE_PROMPT = "Summarize the following text.\n\n{document}"
QUESTION_PROMPT = "{document}\n\nQuestion: {question}"
FOLLOW_UP_PROMPT = "Question: {question}"
UNKNOWN_ANSWER = "The text does not say."


def path() -> pathlib.Path:
    """The GGUF file inside the installed package. FileNotFoundError where the package was built without it."""
    found = pathlib.Path(str(resources.files(__name__).joinpath(FILE_NAME)))
    if not found.is_file():
        raise FileNotFoundError(f"{found} is missing: install edge-runtime from a wheel, or build the model with "
                                f"python -m edge_runtime.models.recipes.build --out {found}")
    return found


def summarize_prompt(document: str) -> str:
    """The user message that asks for a summary of a document."""
    return SUMMARIZE_PROMPT.replace("{document}", document)


def question_prompt(document: str, question: str) -> str:
    """The user message that asks a question about a document."""
    return QUESTION_PROMPT.replace("{question}", question).replace("{document}", document)
