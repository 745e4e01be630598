"""The tokenizer files of a HuggingFace directory as the keys that a GGUF file has for them.

tokenizer.json says what the tokens are and how text is cut; tokenizer_config.json, generation_config.json and
config.json say which of them begin and end; chat_template.jinja, chat_template.json or tokenizer_config.json
hold the chat template, in this order.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from helexa.errors import InvalidFile, UnsupportedModel
from helexa.weights.pre_tokenizers import PRE_TOKENIZERS
from helexa.weights.safetensors import read_json

TOKENIZER = "tokenizer.json"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_LARGEST_ID = 1 << 21
_NAMES = {(rules.patterns, rules.nfc, rules.ignore_merges): name for name, rules in PRE_TOKENIZERS.items()}


def tokenizer_metadata(path: Path, vocab_size: int) -> dict[str, Any]:
    """The keys below `tokenizer.` for a directory; none if it has no tokenizer.json.

    vocab_size: of the model; ids up to there that have no token get unused ones. Raises InvalidFile, or
    UnsupportedModel for what is no byte-level BPE or cuts text in a way that is not known.
    """
    if not (path / TOKENIZER).is_file():
        return {}
    content = read_json(path / TOKENIZER)
    settings = _optional(path, "tokenizer_config.json")
    model = _model(content)
    added = [*_added(content), *_added_in_settings(settings)]
    tokens, types = _vocabulary(model, added, vocab_size)
    ids = {token: number for number, token in enumerate(tokens)}
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_tokenizer(content, model),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": _merges(model),
    }
    bos = ids.get(_token(settings, "bos_token"))
    if bos is not None:
        found["tokenizer.ggml.bos_token_id"] = bos
    ends = _ends(path, ids.get(_token(settings, "eos_token")), len(tokens))
    for key, end in zip(("eos", "eot", "eom"), ends, strict=False):
        found[f"tokenizer.ggml.{key}_token_id"] = end
    before, after = _around(content.get("post_processor"))
    for key, flag, around in (("bos", "add_bos_token", before), ("eos", "add_eos_token", after)):
        said = settings.get(flag)
        found[f"tokenizer.ggml.add_{key}_token"] = said if isinstance(said, bool) else around
    return found | _templates(path, settings)


def _optional(path: Path, name: str) -> dict[str, Any]:
    return read_json(path / name) if (path / name).is_file() else {}


def _invalid(what: str, found: object, expected: str) -> InvalidFile:
    return InvalidFile(f"{TOKENIZER}: {what} is {found!r:.80}, expected {expected}")


def _unsupported(what: str, found: object, expected: str) -> UnsupportedModel:
    return UnsupportedModel(f"{TOKENIZER}: {what} is {found!r:.80}, supported is {expected}")


def _model(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of tokenizer.json with vocabulary and merges."""
    model = content.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise _invalid("model", type(model).__name__, "an object with a vocabulary")
    if model.get("type", "BPE") != "BPE":
        raise _unsupported("model.type", model.get("type"), "BPE")
    for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise _unsupported(f"model.{key}", model[key], "byte-level BPE, which has none")
    vocab = model["vocab"]
    if not isinstance(vocab, dict) or not all(
        type(number) is int and 0 <= number < _LARGEST_ID for number in vocab.values()
    ):
        raise _invalid("model.vocab", type(vocab).__name__, "tokens with their numbers")
    return model


def _added(content: Mapping[str, Any]) -> Iterable[tuple[int, str, bool]]:
    """Number, text and speciality of the tokens that are cut out of a text before all else."""
    for token in content.get("added_tokens") or []:
        if not isinstance(token, dict):
            raise _invalid("an added token", token, "an object")
        yield _added_token(token.get("id"), token)


def _added_in_settings(settings: Mapping[str, Any]) -> Iterable[tuple[int, str, bool]]:
    for number, token in (settings.get("added_tokens_decoder") or {}).items():
        if isinstance(token, dict) and str(number).isdecimal():
            yield _added_token(int(number), token)


def _added_token(number: Any, token: Mapping[str, Any]) -> tuple[int, str, bool]:
    text = token.get("content")
    if type(number) is not int or not 0 <= number < _LARGEST_ID or not isinstance(text, str):
        raise _invalid("an added token", dict(token), "id and content")
    for key in ("lstrip", "rstrip", "single_word"):
        if token.get(key):
            raise _unsupported(f"{key} of the token {text!r}", True, "false")
    return number, text, bool(token.get("special"))


def _vocabulary(
    model: Mapping[str, Any], added: Iterable[tuple[int, str, bool]], vocab_size: int
) -> tuple[list[str], list[int]]:
    """All tokens by number, with their types."""
    by_number = {number: (text, _NORMAL) for text, number in model["vocab"].items()}
    for number, text, is_special in added:
        by_number[number] = (text, _CONTROL if is_special else _USER_DEFINED)
    size = max(max(by_number, default=-1) + 1, vocab_size)
    every = [by_number.get(number, (f"[PAD{number}]", _UNUSED)) for number in range(size)]
    return [text for text, _ in every], [kind for _, kind in every]


def _merges(model: Mapping[str, Any]) -> list[str]:
    """Each merge as its two tokens with a space between."""
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise _invalid("model.merges", type(merges).__name__, "a list")
    if all(isinstance(merge, str) for merge in merges):
        return merges
    if not all(
        isinstance(merge, list) and len(merge) == 2 and all(isinstance(part, str) for part in merge)
        for merge in merges
    ):
        raise _invalid("model.merges", "a list of other things", "pairs of tokens")
    return [" ".join(merge) for merge in merges]


def _pre_tokenizer(content: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """The name that the way to cut text has in GGUF files."""
    patterns = tuple(_patterns(content.get("pre_tokenizer")))
    nfc = any(_is_nfc(step) for step in _steps(content.get("normalizer"), "normalizers"))
    name = _NAMES.get((patterns, nfc, bool(model.get("ignore_merges"))))
    if name is None:
        raise _unsupported("pre_tokenizer", patterns, "that of a known family: " + ", ".join(PRE_TOKENIZERS))
    return name


def _steps(part: Any, several: str) -> list[Any]:
    """The steps of a sequence, or the one step that it is."""
    if not part:
        return []
    steps = part.get(several) if isinstance(part, dict) and part.get("type") == "Sequence" else [part]
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise _invalid(several, part, "steps")
    return steps


def _is_nfc(step: Mapping[str, Any]) -> bool:
    if step.get("type") != "NFC":
        raise _unsupported("normalizer", step.get("type"), "NFC")
    return True


def _patterns(part: Any) -> Iterable[str | None]:
    """The patterns at which text is cut; None is that of GPT-2."""
    kinds = [step.get("type") for step in _steps(part, "pretokenizers")]
    if "ByteLevel" not in kinds:
        raise _unsupported("pre_tokenizer", kinds, "byte-level BPE")
    for step in _steps(part, "pretokenizers"):
        kind, pattern = step.get("type"), step.get("pattern")
        if kind == "ByteLevel" and not step.get("add_prefix_space"):
            yield from [None] if step.get("use_regex", True) else []
        elif kind == "Digits":
            yield r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
        elif kind == "Split" and step.get("behavior") == "Isolated" and isinstance(pattern, dict):
            yield str(pattern.get("Regex", pattern.get("String")))
        else:
            raise _unsupported("a step of pre_tokenizer", step, "Split, Digits or ByteLevel")


def _token(settings: Mapping[str, Any], key: str) -> str:
    """The spelling of a token with a role; empty if there is none."""
    token = settings.get(key)
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _ends(path: Path, first: int | None, num_tokens: int) -> list[int]:
    """The tokens that end an answer, that of the tokenizer first."""
    found = [] if first is None else [first]
    config = _optional(path, "config.json")
    text = config.get("text_config")
    for settings in (_optional(path, "generation_config.json"), config, text):
        ends = settings.get("eos_token_id") if isinstance(settings, dict) else None
        for end in ends if isinstance(ends, list) else [ends]:
            if type(end) is int and 0 <= end < num_tokens and end not in found:
                found.append(end)
    return found


def _around(post_processor: Any) -> tuple[bool, bool]:
    """Whether a text gets a token before it, and one after it."""
    for step in _steps(post_processor, "processors"):
        if step.get("type") == "TemplateProcessing" and isinstance(step.get("single"), list):
            kinds = ["Sequence" in piece for piece in step["single"] if isinstance(piece, dict)]
            if True in kinds:
                return kinds[0] is False, kinds[-1] is False
    return False, False


def _templates(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The chat template, and the one for tools if that is another."""
    own: Any = settings.get("chat_template")
    if (path / "chat_template.jinja").is_file():
        own = (path / "chat_template.jinja").read_text("utf-8", "replace")
    elif (path / "chat_template.json").is_file():
        own = read_json(path / "chat_template.json").get("chat_template")
    by_name: dict[str, Any] = {"default": own}
    if isinstance(own, list):
        entries = [entry for entry in own if isinstance(entry, dict)]
        by_name = {str(entry.get("name")): entry.get("template") for entry in entries}
    further = path / "additional_chat_templates" / "tool_use.jinja"
    if further.is_file():
        by_name["tool_use"] = further.read_text("utf-8", "replace")
    keys = {"default": "tokenizer.chat_template", "tool_use": "tokenizer.chat_template.tool_use"}
    return {key: by_name[name] for name, key in keys.items() if isinstance(by_name.get(name), str)}
