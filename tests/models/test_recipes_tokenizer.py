import random

import numpy as np
import pytest

from edge_runtime.errors import MissingExtraError
from edge_runtime.models.recipes import build
from edge_runtime.models.recipes.batches import make_batch
from edge_runtime.models.recipes.bpe import END, SPECIAL_TOKENS, START, encode_turns, prompt_ids, train_tokenizer
from edge_runtime.models.recipes.config import MINUSCULE, RecipeConfig, recipe_from_json, with_steps
from edge_runtime.models.recipes.corpus import Turn, training_turns


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(MINUSCULE)


def test_the_vocabulary_has_the_size_asked_for_and_all_bytes(tokenizer):
    assert tokenizer.get_vocab_size() == MINUSCULE.network.vocab_size
    assert [tokenizer.id_to_token(i) for i in range(3)] == list(SPECIAL_TOKENS)


def test_round_trips(tokenizer):
    rng = random.Random(11)
    texts = [turn.text for _ in range(50) for turn in training_turns(rng)]
    texts += ["", " ", "\n\n", "  two  spaces\t", "naïve café – 12 °C", "日本語 🙂", "a\u0000b", "I'LL don't"]
    texts += [bytes(rng.randrange(256) for _ in range(40)).decode("utf-8", "replace") for _ in range(50)]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_every_digit_is_a_token(tokenizer):
    assert [t for t in tokenizer.encode("in 2024: 1,250").tokens if t.isdigit()] == list("20241250")


def test_the_assistant_says_its_text_and_its_end(tokenizer):
    ids, spoken = encode_turns(tokenizer, [Turn("user", "Hi"), Turn("assistant", "Hello!")])
    said = [i for i, mine in zip(ids, spoken) if mine]
    assert tokenizer.decode(said, skip_special_tokens=False) == "Hello!" + END
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        f"{START}user\nHi{END}\n{START}assistant\nHello!{END}\n")
    assert prompt_ids(tokenizer, "Hi") == ids[: spoken.index(True)]


def test_batches_are_a_function_of_their_number(tokenizer):
    for number in range(6):
        one, two = make_batch(MINUSCULE, tokenizer, number), make_batch(MINUSCULE, tokenizer, number)
        assert np.array_equal(one.tokens, two.tokens) and np.array_equal(one.weights, two.weights)
        rows, length = one.tokens.shape[0], one.tokens.shape[1] - 1
        assert rows * length == MINUSCULE.batch_tokens
        assert len(one.positions) == int(MINUSCULE.batch_tokens * MINUSCULE.loss_share)
        assert (np.diff(one.positions) > 0).all() and one.positions[-1] < MINUSCULE.batch_tokens
        assert (one.weights == 1).mean() > 0.05
    assert not np.array_equal(make_batch(MINUSCULE, tokenizer, 0).tokens, make_batch(MINUSCULE, tokenizer, 1).tokens)


def test_other_steps_stretch_the_rates():
    longer = with_steps(MINUSCULE, 40)
    assert longer.steps == 40 and longer.rate_points == ((0, 0.25), (6, 1.0), (24, 1.0), (40, 0.0))
    assert with_steps(MINUSCULE, 20) is MINUSCULE


def test_building_without_torch_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="distill"):
        build.require_torch()


def test_a_recipe_survives_json():
    assert recipe_from_json(RecipeConfig().to_json()) == RecipeConfig()
    assert recipe_from_json(MINUSCULE.to_json()) == MINUSCULE


def test_a_vocabulary_too_large_for_the_corpus_is_refused():
    import dataclasses

    network = dataclasses.replace(MINUSCULE.network, vocab_size=50_000)
    with pytest.raises(ValueError, match="50000"):
        train_tokenizer(dataclasses.replace(MINUSCULE, network=network, tokenizer_documents=5))
