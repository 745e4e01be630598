"""How each family of byte-level BPE vocabularies cuts text before merging, by its name in GGUF files.

The rules are those of the families' own tokenizer.json files: patterns, Unicode normalization if any, and
whether a piece that is itself a token skips the merges.
"""

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

_CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(letters: str, digits: str) -> str:
    """The pattern of the cl100k line: contractions, words with a leading sign, digits, signs, spaces."""
    return (
        rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?{letters}|{digits}"
        rf"| ?[^\s{letters.strip('[]+')}\p{{N}}]+[\r\n]*|{_SPACES}"
    )


def _cased_words(contractions: str, digits: str) -> str:
    """The pattern of the o200k line, which also cuts where lower case turns to upper case."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    sign = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{sign}{upper}*{lower}+{contractions}|{sign}{upper}+{lower}*{contractions}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


@dataclass(frozen=True)
class PreTokenizer:
    """The rules of one family. patterns: applied one after the other; None is the pattern of GPT-2."""

    patterns: tuple[str | None, ...]
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False  # where the file does not say

    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.nfc else None

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The pre-tokenizer, which also turns bytes into the characters that stand for them."""
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns if pattern]
        by_gpt2 = None in self.patterns
        return pre_tokenizers.Sequence(
            [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_gpt2)]
        )


_GPT2 = PreTokenizer((None,))
_LLAMA3 = PreTokenizer((_words(r"\p{L}+", r"\p{N}{1,3}"),), ignore_merges=True, adds_bos=True)
_QWEN2 = PreTokenizer((_words(r"\p{L}+", r"\p{N}"),), nfc=True)
_QWEN35 = PreTokenizer((_words(r"[\p{L}\p{M}]+", r"\p{N}"),), nfc=True)
_SMOLLM = PreTokenizer((r"\p{N}", None))
_TEKKEN = PreTokenizer((_cased_words("", r"\p{N}"),), ignore_merges=True, adds_bos=True)
_O200K = PreTokenizer((_cased_words(rf"(?i:{_CONTRACTIONS})?", r"\p{N}{1,3}"),))
# What files without a name were made with: punctuation, then words, then digits in threes from the left.
_DEFAULT = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", None, r"\p{N}+", "[0-9][0-9][0-9]"))

PRE_TOKENIZERS = {
    "default": _DEFAULT,
    "deepseek-r1-qwen": _QWEN2,
    "gpt-2": _GPT2,
    "gpt-4o": _O200K,
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _QWEN2,
    "qwen35": _QWEN35,
    "smollm": _SMOLLM,
    "tekken": _TEKKEN,
}
