"""Logfmt lines."""

import io
import logging

import pytest

from helexa.log import LogfmtFormatter, configure_logging, fields, quote


@pytest.fixture
def root_logger():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", "plain"),
        ("two words", '"two words"'),
        ('a"b', '"a\\"b"'),
        ("a\nb", '"a\\nb"'),
        ("a\\b", '"a\\\\b"'),
        ("\x1b[0m", '"\\x1b[0m"'),
        ("", '""'),
        (True, "true"),
        (0.123456789, "0.123457"),
        (12, "12"),
    ],
)
def test_values_are_quoted_only_where_needed(value, text):
    assert quote(value) == text


def test_an_event_is_one_line_of_pairs(root_logger):
    stream = io.StringIO()
    configure_logging("info", stream)
    logging.getLogger("helexa.x").info("loaded", extra=fields(model="a b", seconds=1.5, nothing=None))
    logging.getLogger("helexa.x").debug("unseen")
    (line,) = stream.getvalue().splitlines()
    assert "level=info" in line
    assert "logger=helexa.x" in line
    assert line.endswith('event=loaded model="a b" seconds=1.5')


def test_a_plain_message_is_a_msg():
    record = logging.LogRecord("n", logging.WARNING, "f", 1, "all %s", ("good",), None)
    assert LogfmtFormatter().format(record).endswith('msg="all good"')


def test_configuring_twice_leaves_one_handler(root_logger):
    first, second = io.StringIO(), io.StringIO()
    configure_logging("debug", first)
    configure_logging("info", second)
    logging.getLogger("helexa.x").info("once")
    assert not first.getvalue()
    assert len(second.getvalue().splitlines()) == 1


def test_a_traceback_follows_on_indented_lines(root_logger):
    stream = io.StringIO()
    configure_logging("info", stream)
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        logging.getLogger("helexa.x").exception("failed")
    head, *rest = stream.getvalue().splitlines()
    assert "level=error" in head
    assert rest
    assert all(line.startswith("  ") for line in rest)
