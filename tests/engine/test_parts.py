"""What is shared by engines of one file, and what is made anew."""

import os
from pathlib import Path

import pytest

from helexa.engine import parts


class File:
    """A file that counts how often its text parts are wanted."""

    def __init__(self, path: Path):
        self.path, self.num_read = path, 0

    def text_metadata(self) -> dict[str, object]:
        self.num_read += 1
        return {}


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(parts, "_text_parts", type(parts._text_parts)())


def test_the_text_parts_of_a_file_are_made_once_while_it_is_one_of_the_last(tmp_path):
    path = tmp_path / "m.gguf"
    path.touch()
    file, other, third = File(path), File(path), File(path)
    first = parts.text_parts(file, "a")
    assert parts.text_parts(file, "a") is first
    assert file.num_read == 1
    parts.text_parts(other, "b")
    assert parts.text_parts(file, "a") is first  # used last, so the other one goes
    parts.text_parts(third, "c")
    assert parts.text_parts(file, "a") is first
    parts.text_parts(other, "b")
    assert (file.num_read, other.num_read, third.num_read) == (1, 2, 1)


def test_a_directory_whose_files_have_changed_is_read_again(tmp_path):
    template = tmp_path / "chat_template.jinja"
    template.write_text("one")
    file = File(tmp_path)
    parts.text_parts(file, "a")
    parts.text_parts(file, "a")
    assert file.num_read == 1
    template.write_text("two")
    os.utime(template, (1, 1))
    parts.text_parts(file, "a")
    assert file.num_read == 2
