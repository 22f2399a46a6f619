"""How byte-level BPE vocabularies cut text into words before they merge: the names in `tokenizer.ggml.pre`.

Patterns and flags are those of llama.cpp's `src/llama-vocab.cpp`, whose ids a GGUF file promises, written for
Oniguruma: where llama.cpp approximates letter case by `(?=\\p{L})[^a-z]`, an intersection of classes says the same.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge_runtime.errors import UnsupportedModelError

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer


@dataclass(frozen=True)
class PreTokenizerSpec:
    """patterns: applied one after the other, each splits the pieces of the one before; what a pattern leaves over
    stays a piece. ignore_merges: a whole word that is in the vocabulary is taken as it is. add_bos: a BOS is written
    where the file does not say."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
# llama.cpp writes \s*[\r\n]+, which tries every end of a long run of spaces; this is the same without going back.
_LINES = r"(?:[^\S\r\n]*+[\r\n]+)+"
_SPACES = _LINES + r"|\s+(?!\S)|\s+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
# Letters that are not a-z (U), then letters that are not A-Z (L): U*L+ or else U+L*, the optional character before
# either. Letters outside ASCII are both. Written out by where U* ends: before a-z, after the last that is both, or
# neither, so that a long run is read once.
_BOTH = r"[\p{L}&&[^A-Za-z]]"
_CASED = (r"[^\r\n\p{L}\p{N}]?(?:[\p{L}&&[^a-z]]*+(?=[a-z])[\p{L}&&[^A-Z]]+"
          rf"|(?:[A-Z]*+{_BOTH}++)+|[A-Z]++)SUFFIX|")
_CASED_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_TAIL}"
_QWEN35 = (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _SPACES)
_TEKKEN = _CASED.replace("SUFFIX", "") + r"\p{N}|" + _CASED_TAIL
_GPT4O = _CASED.replace("SUFFIX", _CONTRACTIONS + "?") + r"\p{N}{1,3}|" + _CASED_TAIL
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_BAILING = (r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|" + _WORD + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES)
_SEED_CODER = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_JAIS2 = (rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES}|"
          + "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)) + r"|\s{1,2}(?!\S)|\s{1}")

# Cased letters of DeepSeek-LLM's own pattern. Its ranges of punctuation and of Han reach over U+3000 and other
# spaces, which are left out here because llama.cpp reads them as whitespace first.
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿ\u0386\u0388-\u038a\u038c\u038e-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚ"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffcℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏"
    "𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_HAN_HANGUL = r"[一-龥ࠀ-一가-퟿&&\S]+"
_DEEPSEEK_LLM = (r"[\r\n]", rf"\s?[{_DEEPSEEK_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟\u3001-。]+", r"\s+\z",
                 _HAN_HANGUL, r"\p{N}+")
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_HANGUL, r"\p{N}")
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES)
_FALCON = (r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]")
_DEFAULT = (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")

_FAMILIES: tuple[tuple[PreTokenizerSpec, str], ...] = (
    (PreTokenizerSpec(_DEFAULT), "default"),
    (PreTokenizerSpec((_LLAMA3,), ignore_merges=True, add_bos=True),
     "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano"),
    (PreTokenizerSpec((_LLAMA3,)), "dbrx smaug-bpe glm4 chatglm-bpe"),
    (PreTokenizerSpec((_QWEN2,)), "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2"),
    (PreTokenizerSpec((_QWEN35,)), "qwen35"),
    (PreTokenizerSpec((_GPT2,)),
     "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum modern-bert"),
    (PreTokenizerSpec((r"\p{N}", _GPT2)), "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2"),
    (PreTokenizerSpec(_FALCON), "falcon"),
    (PreTokenizerSpec(_DEEPSEEK_LLM), "deepseek-llm"),
    (PreTokenizerSpec(_DEEPSEEK_CODER), "deepseek-coder"),
    (PreTokenizerSpec(_DEEPSEEK_V3), "deepseek-v3 hunyuan-dense joyai-llm hy_v4"),
    (PreTokenizerSpec((_TEKKEN,), ignore_merges=True, add_bos=True), "tekken"),
    (PreTokenizerSpec((_GPT4O,)), "gpt-4o llama4 kanana2 talkie minimax-m2"),
    (PreTokenizerSpec((_BLOOM,)), "bloom poro-chat gpt3-finnish"),
    (PreTokenizerSpec((_BLOOM, r"\p{N}")), "viking"),
    (PreTokenizerSpec((_BAILING,)), "bailingmoe bailingmoe2 llada-moe"),
    (PreTokenizerSpec((_SEED_CODER,)), "seed-coder"),
    (PreTokenizerSpec((_JAIS2,)), "jais-2"),
    (PreTokenizerSpec((r"\p{N}{1,3}", rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}+|{_TAIL}"), ignore_merges=True), "minicpm5"),
)

PRE_TOKENIZERS: dict[str, PreTokenizerSpec] = {
    name: spec for spec, names in _FAMILIES for name in names.split()}


def pre_tokenizer_spec(name: str | None) -> PreTokenizerSpec:
    """The rules that `tokenizer.ggml.pre` names; a file without the key gets `default`, as in llama.cpp.

    Raises UnsupportedModelError for a name that is not in `PRE_TOKENIZERS`.
    """
    if not name:
        return PRE_TOKENIZERS["default"]
    try:
        return PRE_TOKENIZERS[name]
    except KeyError:
        raise UnsupportedModelError(f"pre-tokenizer {name!r}", sorted(PRE_TOKENIZERS)) from None


def splitter(spec: PreTokenizerSpec) -> PreTokenizer:
    """A `tokenizers` pre-tokenizer that cuts text into `spec`'s words, characters unchanged."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Sequence, Split

    return Sequence([Split(Regex(p), "isolated") for p in spec.patterns])
