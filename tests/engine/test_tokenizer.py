"""Byte-level BPE from GGUF metadata, special tokens, and incremental decoding."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helexa.engine.tokenizer import Detokenizer, Tokenizer
from helexa.errors import BadRequest, InvalidFile, InvalidParameter, UnsupportedModel
from helexa.weights.pre_tokenizers import PRE_TOKENIZERS

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_CHARACTERS = dict(zip(_PRINTABLE, map(chr, _PRINTABLE), strict=True))
_CHARACTERS |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in _PRINTABLE)}
_MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "12 3", "Ã ©"]
_EXTRA = {
    "<|im_start|>": 3,
    "<|im_end|>": 3,
    "<|im_end|>!": 4,
    "<think>": 4,
    "[PAD0]": 5,
    "<0xE2>": 6,
    "<|endoftext|>": 3,
}


def _metadata(pre="smollm", **extra):
    """A vocabulary of all bytes, a few merges and some tokens of each other kind."""
    tokens = [_CHARACTERS[byte] for byte in range(256)]
    tokens += [merge.replace(" ", "") for merge in _MERGES]
    types = [1] * len(tokens) + list(_EXTRA.values())
    tokens += list(_EXTRA)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": _MERGES,
        "tokenizer.ggml.bos_token_id": tokens.index("<|im_start|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        **{f"tokenizer.ggml.{key}": value for key, value in extra.items()},
    }


def _id(spelling):
    return _metadata()["tokenizer.ggml.tokens"].index(spelling)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_gguf(_metadata())


def _pieces(name, text):
    """The pieces into which the pre-tokenizer cuts `text`."""
    return [text[start:end] for _, (start, end) in PRE_TOKENIZERS[name].build().pre_tokenize_str(text)]


# Encoding


def test_bytes_are_merged_in_the_order_of_the_merges(tokenizer):
    assert tokenizer.encode("hello") == [_id("hello")]
    assert tokenizer.encode("hell") == [_id("hell")]
    assert tokenizer.encode(" wé") == [_id("Ġw"), _id("Ã©")]
    assert tokenizer.encode("") == []


@given(text=st.text())
def test_any_text_survives_encoding_and_decoding(tokenizer, text):
    for parse_special in (True, False):
        token_ids = tokenizer.encode(text, parse_special=parse_special)
        assert tokenizer.decode(token_ids) == text
        assert all(0 <= token_id < tokenizer.vocab_size for token_id in token_ids)


@given(parts=st.lists(st.sampled_from([*_EXTRA, "<|im_", "end|>", "hello", " w", "\n", "é", "!"])))
def test_text_full_of_special_tokens_survives_encoding_and_decoding(tokenizer, parts):
    text = "".join(parts)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    plain = tokenizer.encode(text, parse_special=False)
    assert tokenizer.decode(plain) == text
    assert not any(tokenizer.is_special(token_id) for token_id in plain)


def test_special_tokens_are_found_in_text_and_the_longest_one_wins(tokenizer):
    assert tokenizer.encode("<|im_start|>hello<|im_end|>") == [
        _id("<|im_start|>"),
        _id("hello"),
        _id("<|im_end|>"),
    ]
    assert tokenizer.encode("<|im_end|>!") == [_id("<|im_end|>!")]
    assert tokenizer.encode("<think>") == [_id("<think>")]


def test_control_tokens_can_be_left_alone_while_those_of_the_text_are_still_found(tokenizer):
    assert _id("<|im_start|>") not in tokenizer.encode("<|im_start|>", parse_special=False)
    assert tokenizer.encode("<think>", parse_special=False) == [_id("<think>")]


def test_padding_tokens_are_never_found_in_text(tokenizer):
    assert tokenizer.encode("[PAD0]") == [_id(character) for character in "[PAD0]"]


def test_the_beginning_is_added_once_where_the_file_asks_for_it():
    tokenizer = Tokenizer.from_gguf(_metadata(add_bos_token=True, add_eos_token=True))
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokenizer.encode("hello") == [_id("hello")]
    assert tokenizer.encode("hello", add_special=True) == [begin, _id("hello"), end]
    assert tokenizer.encode("<|im_start|>hello", add_special=True) == [begin, _id("hello"), end]
    assert tokenizer.encode("", add_special=True) == [begin, end]
    assert Tokenizer.from_gguf(_metadata()).encode("hello", add_special=True) == [_id("hello")]


def test_llama_3_adds_the_beginning_where_the_file_is_silent():
    assert Tokenizer.from_gguf(_metadata("llama-bpe")).encode("", add_special=True) == [_id("<|im_start|>")]
    assert Tokenizer.from_gguf(_metadata("llama-bpe", add_bos_token=False)).encode("", add_special=True) == []


@pytest.mark.parametrize("name", ["smollm", "qwen2"])
@given(st.text(max_size=40), st.integers(1, 50))
def test_the_least_number_of_tokens_is_never_too_large(name, text, times):
    tokenizer = Tokenizer.from_gguf(_metadata(name))
    for whole in (text * times, "\u03b9\u0308\u0301" * times, "<|im_start|>" * times):
        assert tokenizer.least_tokens(whole) <= len(tokenizer.encode(whole))


def test_a_long_text_is_known_to_be_long_without_being_encoded(tokenizer):
    assert tokenizer.least_tokens("x" * 10**7) > 10**5


def test_half_a_surrogate_pair_is_refused_with_its_place(tokenizer):
    with pytest.raises(BadRequest, match="at character 1"):
        tokenizer.encode("a\ud800")


def test_qwen_normalizes_and_the_others_do_not(tokenizer):
    decomposed = unicodedata.normalize("NFD", "é")
    assert tokenizer.decode(tokenizer.encode(decomposed)) == decomposed
    for name in ("qwen2", "qwen35"):
        qwen = Tokenizer.from_gguf(_metadata(name))
        assert qwen.encode(decomposed) == qwen.encode("é") == [_id("Ã©")]


def test_a_piece_that_is_a_token_skips_the_merges_only_where_the_family_does_so():
    data = _metadata("llama-bpe")
    data["tokenizer.ggml.merges"] = [merge for merge in _MERGES if merge != "hell o"]
    assert Tokenizer.from_gguf(data).encode("hello") == [_id("hello")]
    data["tokenizer.ggml.pre"] = "gpt-2"
    assert Tokenizer.from_gguf(data).encode("hello") == [_id("hell"), _id("o")]


# Pre-tokenizers


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
@given(text=st.text())
def test_every_pre_tokenizer_keeps_all_of_the_text(name, text):
    tokenizer = Tokenizer.from_gguf(_metadata(name))
    form = unicodedata.normalize("NFC", text) if PRE_TOKENIZERS[name].nfc else text
    assert tokenizer.decode(tokenizer.encode(text)) == form


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("gpt-2", ["It", "'s", " 2024", ",", " isn", "'", "T", " it", "?!", "\n\n ", " x"]),
        (
            "smollm",
            ["It", "'s", " ", "2", "0", "2", "4", ",", " isn", "'", "T", " it", "?!", "\n\n ", " x"],
        ),
        ("llama-bpe", ["It", "'s", " ", "202", "4", ",", " isn", "'T", " it", "?!\n\n", " ", " x"]),
        ("qwen2", ["It", "'s", " ", "2", "0", "2", "4", ",", " isn", "'T", " it", "?!\n\n", " ", " x"]),
        ("qwen35", ["It", "'s", " ", "2", "0", "2", "4", ",", " isn", "'T", " it", "?!\n\n", " ", " x"]),
        ("tekken", ["It", "'s", " ", "2", "0", "2", "4", ",", " isn", "'T", " it", "?!\n\n", " ", " x"]),
        ("gpt-4o", ["It's", " ", "202", "4", ",", " isn'T", " it", "?!\n\n", " ", " x"]),
    ],
)
def test_families_cut_words_digits_and_spaces_each_in_their_way(name, pieces):
    text = "It's 2024, isn'T it?!\n\n  x"
    assert _pieces(name, text) == pieces


def test_a_combining_mark_stays_with_its_letter_in_qwen35_only():
    word = "नमस्ते"
    assert _pieces("qwen35", word) == [word]
    assert len(_pieces("qwen2", word)) > 1


def test_case_cuts_words_in_the_o200k_line_only():
    assert _pieces("gpt-4o", "helloWorld") == ["hello", "World"]
    assert _pieces("llama-bpe", "helloWorld") == ["helloWorld"]


# Decoding


def test_bytes_of_tokens_of_every_kind(tokenizer):
    assert tokenizer.token_bytes(_id("Ġw")) == b" w"
    assert tokenizer.token_bytes(_id("Ã©")) == "é".encode()
    assert tokenizer.token_bytes(_id("<think>")) == b"<think>"
    assert tokenizer.token_bytes(_id("<0xE2>")) == b"\xe2"
    assert tokenizer.token_bytes(0) == b"\x00"


def test_control_tokens_are_left_out_of_decoded_text_on_request(tokenizer):
    token_ids = tokenizer.encode("<|im_start|><think>hello<|im_end|>")
    assert tokenizer.decode(token_ids, skip_special=True) == "<think>hello"


@pytest.mark.parametrize("marker", ["<think>", "</think>", "<tool_call>", "[THINK]"])
def test_markers_of_the_output_are_text_even_if_their_file_calls_them_control_tokens(marker):
    metadata = _metadata()
    metadata["tokenizer.ggml.tokens"][-1] = marker
    metadata["tokenizer.ggml.token_type"][-1] = 3
    if marker == "<think>":
        metadata["tokenizer.ggml.tokens"][_id("<think>")] = "<other>"
    tokenizer = Tokenizer.from_gguf(metadata)
    token_ids = tokenizer.encode(f"<|im_start|>{marker}hello<|im_end|>")
    assert tokenizer.decode(token_ids, skip_special=True) == f"{marker}hello"
    assert marker in tokenizer.added_tokens


def test_a_token_beyond_the_vocabulary_is_refused(tokenizer):
    for token_id in (-1, tokenizer.vocab_size):
        with pytest.raises(InvalidParameter, match=f"token id {token_id} is outside the vocabulary"):
            tokenizer.decode([token_id])


def test_a_character_over_several_tokens_comes_out_whole(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(byte) for byte in "🙂é".encode()] == ["", "", "", "🙂", "", "é"]
    assert detokenizer.flush() == ""


def test_an_unfinished_character_is_replaced_at_the_end(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(byte) for byte in b"a\xf0\x9f"] == ["a", "", ""]
    assert detokenizer.flush() == "\ufffd"


@given(token_ids=st.lists(st.integers(0, 255 + len(_MERGES) + len(_EXTRA))), skip=st.booleans())
def test_the_stream_adds_up_to_the_whole_for_any_tokens(tokenizer, token_ids, skip):
    detokenizer = Detokenizer(tokenizer, skip_special=skip)
    pushed = [detokenizer.push(token_id) for token_id in token_ids]
    assert "".join(pushed) + detokenizer.flush() == tokenizer.decode(token_ids, skip_special=skip)


@given(data=st.binary())
def test_the_stream_of_any_bytes_is_their_replacement_decoding(tokenizer, data):
    detokenizer = Detokenizer(tokenizer)
    assert "".join(map(detokenizer.push, data)) + detokenizer.flush() == data.decode("utf-8", "replace")


# What the file says


def test_all_ends_are_known_also_those_that_only_their_names_give_away(tokenizer):
    assert tokenizer.eos_token_ids == {_id("<|im_end|>"), _id("<|endoftext|>")}
    more = Tokenizer.from_gguf(_metadata(eot_token_id=5, eom_token_id=6))
    assert more.eos_token_ids == {_id("<|im_end|>"), _id("<|endoftext|>"), 5, 6}
    assert (more.eos_token, more.bos_token) == ("<|im_end|>", "<|im_start|>")
    assert tokenizer.special_tokens.keys() == {"<|im_start|>", "<|im_end|>", "<|endoftext|>"}


def test_a_file_without_beginning_and_end_has_none():
    data = _metadata()
    del data["tokenizer.ggml.bos_token_id"], data["tokenizer.ggml.eos_token_id"]
    tokenizer = Tokenizer.from_gguf(data)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.bos_token, tokenizer.eos_token) == (
        None,
        None,
        "",
        "",
    )


def test_an_unknown_pre_tokenizer_is_refused_with_the_known_ones():
    with pytest.raises(UnsupportedModel, match=r"'wolof' is not known; known are default, .*qwen35"):
        Tokenizer.from_gguf(_metadata("wolof"))


@pytest.mark.parametrize("kind", ["llama", "bert", None])
def test_other_kinds_of_tokenizers_are_refused_by_name(kind):
    with pytest.raises(UnsupportedModel, match=f"{kind!r}; supported is byte-level BPE"):
        Tokenizer.from_gguf(_metadata(model=kind))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"tokens": None}, "tokens is None, expected an array"),
        ({"merges": "a b"}, "merges is 'a b', expected an array"),
        ({"token_type": [1]}, "token_type has 1 items"),
        ({"merges": ["h e", "hello"]}, "not two tokens and a space"),
        ({"merges": ["h e", "z q"]}, "merges does not fit"),
        ({"bos_token_id": 10**6}, "bos_token_id is 1000000"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
    ],
)
def test_a_broken_vocabulary_is_refused_by_key(broken, message):
    with pytest.raises(InvalidFile, match=message):
        Tokenizer.from_gguf(_metadata(**broken))


def test_a_file_without_token_types_has_ordinary_tokens_only():
    data = _metadata()
    del data["tokenizer.ggml.token_type"]
    assert Tokenizer.from_gguf(data).special_tokens == {}


def test_all_tokens_at_once_are_those_one_by_one(tokenizer):
    found = tokenizer.all_token_bytes()
    assert found == [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
    special = [token_id for token_id in range(tokenizer.vocab_size) if tokenizer.is_special(token_id)]
    assert sorted(tokenizer.special_token_ids) == special


def test_all_tokens_at_once_where_an_ordinary_one_is_spelled_as_text():
    data = _metadata()
    data["tokenizer.ggml.tokens"][-1], data["tokenizer.ggml.token_type"][-1] = "two words", 1
    tokenizer = Tokenizer.from_gguf(data)
    found = tokenizer.all_token_bytes()
    assert found[-1] == b"two words"
    assert found == [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
