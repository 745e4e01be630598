"""Tokenizer files of a directory: the tokens that the library makes that wrote them, and clear refusals."""

import json

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from helexa.engine.chat_template import ChatTemplate
from helexa.engine.tokenizer import Tokenizer
from helexa.errors import InvalidFile, UnsupportedModel
from helexa.weights.hf_tokenizer import tokenizer_metadata
from helexa.weights.pre_tokenizers import PRE_TOKENIZERS

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("1", "2"), ("'", "t")]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
TEXTS = [
    "hello world, hell 12345 don't",
    "<|im_start|>user\nhello<|im_end|>\n<think>x</think>",
    "cafe\u0301 日本 \t\n\n  नम\r\n",
    "   ",
    "",
]


def library_tokenizer(name="qwen2"):
    rules = PRE_TOKENIZERS[name]
    vocab = {token: number for number, token in enumerate(BYTES)}
    for left, right in MERGES:
        vocab[left + right] = len(vocab)
    model = models.BPE(vocab, MERGES, ignore_merges=rules.ignore_merges)
    tokenizer = tokenizers.Tokenizer(model)
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rules.patterns if pattern]
    if name == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True)]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=None in rules.patterns))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if rules.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def write(path, tokenizer=None, change=lambda content: None, **files):
    """The directory with a tokenizer.json, changed if wanted, and other files by name, without suffix."""
    content = json.loads((tokenizer or library_tokenizer()).to_str())
    change(content)
    (path / "tokenizer.json").write_text(json.dumps(content))
    for name, settings in files.items():
        (path / f"{name}.json").write_text(json.dumps(settings))
    return path


def read(path, vocab_size=300):
    return Tokenizer.from_gguf(tokenizer_metadata(path, vocab_size))


@pytest.mark.parametrize("name", ["qwen2", "qwen35", "llama3", "smollm", "gpt-2", "gpt-4o", "tekken"])
def test_texts_become_the_tokens_that_the_library_makes_of_them(tmp_path, name):
    library = library_tokenizer(name)
    metadata = tokenizer_metadata(write(tmp_path, library), 300)
    rules = PRE_TOKENIZERS[metadata["tokenizer.ggml.pre"]]
    assert (rules.patterns, rules.nfc) == (PRE_TOKENIZERS[name].patterns, PRE_TOKENIZERS[name].nfc)
    tokenizer = Tokenizer.from_gguf(metadata)
    for text in TEXTS:
        ids = library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=False)


def test_merges_are_read_as_pairs_and_as_texts(tmp_path):
    def as_texts(content):
        content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]

    pairs = tokenizer_metadata(write(tmp_path), 300)
    assert tokenizer_metadata(write(tmp_path, change=as_texts), 300) == pairs


def test_a_directory_without_a_tokenizer_has_no_keys(tmp_path):
    assert tokenizer_metadata(tmp_path, 300) == {}


def test_tokens_are_special_as_the_file_says_and_ids_without_one_are_filled_up(tmp_path):
    tokenizer = read(write(tmp_path))
    assert set(tokenizer.special_tokens) == set(SPECIAL)
    assert set(tokenizer.added_tokens) == {*SPECIAL, "<think>", "</think>"}
    assert tokenizer.vocab_size == 300
    assert tokenizer.token_bytes(299) == b"[PAD299]"


def test_tokens_that_only_the_settings_name_are_added(tmp_path):
    settings = {"added_tokens_decoder": {"290": {"content": "<extra>", "special": True}}}
    assert read(write(tmp_path, tokenizer_config=settings)).encode("<extra>") == [290]


def test_ends_come_from_all_files_that_name_them(tmp_path):
    library = library_tokenizer()
    im_end, end = library.token_to_id("<|im_end|>"), library.token_to_id("<|endoftext|>")
    path = write(
        tmp_path,
        tokenizer_config={"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>"},
        generation_config={"eos_token_id": [end, im_end]},
        config={"text_config": {"eos_token_id": 5}},
    )
    tokenizer = read(path)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.bos_token == "<|im_start|>"
    assert {im_end, end, 5} <= tokenizer.eos_token_ids


@pytest.mark.parametrize(
    ("said", "expected"), [({}, True), ({"add_bos_token": True}, True), ({"add_bos_token": False}, False)]
)
def test_a_text_begins_as_the_post_processor_says_unless_the_settings_say_otherwise(tmp_path, said, expected):
    library = library_tokenizer("llama3")
    start = library.token_to_id("<|im_start|>")
    template = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    library.post_processor = processors.Sequence([processors.ByteLevel(), template])
    tokenizer = read(write(tmp_path, library, tokenizer_config={"bos_token": "<|im_start|>", **said}))
    ids = library.encode("hello", add_special_tokens=expected).ids
    assert tokenizer.encode("hello", add_special=True) == ids
    assert (ids[0] == start) is expected


def test_the_chat_template_is_looked_for_in_three_places(tmp_path):
    def template():
        metadata = tokenizer_metadata(tmp_path, 300)
        found = ChatTemplate.from_gguf(metadata, Tokenizer.from_gguf(metadata))
        return found.source, found.tool_use_source

    write(tmp_path, tokenizer_config={"chat_template": "one"})
    assert template() == ("one", "one")
    both = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    write(tmp_path, tokenizer_config={"chat_template": both})
    assert template() == ("plain", "tools")
    write(tmp_path, chat_template={"chat_template": "two"})
    assert template() == ("two", "two")
    (tmp_path / "chat_template.jinja").write_text("three é", "utf-8")
    assert template() == ("three é", "three é")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("four")
    assert template() == ("three é", "four")


def setter(*path, value):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setter("model", "type", value="Unigram"), "model.type is 'Unigram', supported is BPE"),
        (setter("model", "byte_fallback", value=True), "model.byte_fallback is True"),
        (setter("pre_tokenizer", value={"type": "Metaspace"}), "pre_tokenizer is .*supported is byte-level"),
        (setter("normalizer", value={"type": "Lowercase"}), "normalizer is 'Lowercase', supported is NFC"),
        (setter("added_tokens", 0, "lstrip", value=True), r"lstrip of the token '<\|im_start\|>' is True"),
        (
            setter("pre_tokenizer", "pretokenizers", 0, "pattern", value={"Regex": "a"}),
            "supported is that of a known family",
        ),
    ],
)
def test_what_would_give_other_tokens_is_refused_by_name(tmp_path, change, message):
    with pytest.raises(UnsupportedModel, match=message):
        tokenizer_metadata(write(tmp_path, change=change), 300)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setter("model", value=None), "model is 'NoneType', expected an object with a vocabulary"),
        (setter("model", "vocab", value={"a": -1}), "model.vocab is .*expected tokens with their numbers"),
        (setter("model", "merges", value=[1]), "model.merges is .*expected pairs of tokens"),
        (setter("model", "merges", value=None), "model.merges is .*expected a list"),
        (setter("added_tokens", 0, "id", value=1 << 40), "an added token is .*expected id and content"),
        (setter("added_tokens", 0, value=5), "an added token is 5, expected an object"),
    ],
)
def test_a_broken_file_is_refused_with_what_was_found(tmp_path, change, message):
    with pytest.raises(InvalidFile, match=message):
        tokenizer_metadata(write(tmp_path, change=change), 300)


def test_what_is_no_json_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InvalidFile, match=r"tokenizer\.json: found what is no JSON"):
        tokenizer_metadata(tmp_path, 300)
