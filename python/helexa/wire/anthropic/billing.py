"""The line that Claude Code puts before its system prompt, without what changes in it between requests.

`x-anthropic-billing-header: cc_version=2.1.197.3f1; cc_entrypoint=cli; cch=a81c7;` has a hash of the request
and a suffix that differs between agents. As the line comes first, each change would cost the prefix cache all
that follows.
"""

import re

_LINE = re.compile(r"x-anthropic-billing-header:[^\n]*")
_SUFFIX = re.compile(r"\b(cc_version=\d+\.\d+\.\d+)\.[^;\s]*")
_HASH = re.compile(r"\b(cch=)[^;\s]*")


def normalize_billing_line(text: str) -> str:
    """`text` with a constant hash and without the version's suffix, if it begins with such a line."""
    line = _LINE.match(text)
    if line is None:
        return text
    return _HASH.sub(r"\g<1>0", _SUFFIX.sub(r"\g<1>", line[0])) + text[line.end() :]
