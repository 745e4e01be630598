import pytest

from helexa.wire.anthropic.billing import normalize_billing_line

LINE = "x-anthropic-billing-header: cc_version=2.1.197.{}; cc_entrypoint=cli; cch={};"


def test_requests_and_agents_get_the_same_line():
    lines = {
        normalize_billing_line(LINE.format(*varying)) for varying in (("3f1", "a81c7"), ("90b", "00000"))
    }
    assert lines == {"x-anthropic-billing-header: cc_version=2.1.197; cc_entrypoint=cli; cch=0;"}


def test_what_follows_the_line_stays():
    text = "\nSet cch=12 and cc_version=1.2.3.4 as they are."
    assert normalize_billing_line(LINE.format("3f1", "a81c7") + text).endswith("cch=0;" + text)


@pytest.mark.parametrize("text", ["", "You are an agent; cch=12;", "\n" + LINE.format("3f1", "a81c7")])
def test_other_texts_stay(text):
    assert normalize_billing_line(text) == text


def test_a_line_that_has_nothing_to_hold_constant_stays():
    line = "x-anthropic-billing-header: cc_version=2.1.197; cc_entrypoint=sdk-cli;"
    assert normalize_billing_line(line) == line
