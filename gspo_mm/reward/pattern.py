r"""Regular expressions of reward files, and the answer that they find in a text.

They run in the `regex` package, as Python's own `re` has no time limit: on a pattern such as `(a+)+b` it tries
for hours, with a text that the model wrote. Here such a match ends after LIMIT seconds with an error, which is
the pattern's fault: the completion gets no reward, rather than 0.
"""

from __future__ import annotations

from functools import lru_cache

import regex

LIMIT = 1.0  # seconds for one pattern on one text
BOXED = "boxed"  # as `extract`: what stands in \boxed{...}


class SlowPatternError(ValueError):
    """A pattern took too long on a text."""


@lru_cache(maxsize=256)
def compile_pattern(pattern: str) -> regex.Pattern[str]:
    """Compile with `.` matching line ends; raises ValueError saying what is wrong."""
    try:
        return regex.compile(pattern, regex.DOTALL)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"not a regular expression: {error}") from None


def matches(pattern: str, text: str) -> bool:
    """True where the whole text matches. Raises SlowPatternError."""
    try:
        return compile_pattern(pattern).fullmatch(text, timeout=LIMIT) is not None
    except TimeoutError:
        raise _slow(pattern, text) from None


def search(pattern: str, text: str) -> bool:
    """True where the pattern matches anywhere. Raises SlowPatternError."""
    try:
        return compile_pattern(pattern).search(text, timeout=LIMIT) is not None
    except TimeoutError:
        raise _slow(pattern, text) from None


def extract_answer(text: str, pattern: str | None) -> str | None:
    """The answer stated in the text, stripped; None where none is stated, or two different ones are.

    `pattern` is a regular expression with at most one group, or `boxed`; None: the text is the answer.
    Raises SlowPatternError.
    """
    if pattern is None:
        return text.strip()
    try:
        answers = set(boxed(text) if pattern == BOXED else _found(pattern, text))
    except TimeoutError:
        raise _slow(pattern, text) from None
    return answers.pop() if len(answers) == 1 else None


def boxed(text: str) -> list[str]:
    r"""What stands in each \boxed{...} that is closed; of one inside another, only the outer."""
    found = []
    start = depth = 0
    position = text.find("\\boxed{")
    while position != -1:
        start = position + len("\\boxed{")
        depth = 1
        for i in range(start, len(text)):
            # a brace after a backslash is a sign of its own, as in \{1, 2\}
            if text[i] in "{}" and text[i - 1] != "\\":
                depth += 1 if text[i] == "{" else -1
            if depth == 0:
                found.append(text[start:i].strip())
                position = text.find("\\boxed{", i)
                break
        else:
            return found
    return found


def delimited(text: str, pattern: str) -> set[str]:
    """The different answers that stand between the marks of the pattern, such as tags; empty for a pattern without any."""
    if pattern == BOXED:
        return set(boxed(text))
    compiled = compile_pattern(pattern)
    try:
        found = list(compiled.finditer(text, timeout=LIMIT)) if compiled.groups else []
    except TimeoutError:
        raise _slow(pattern, text) from None
    return {m[1].strip() for m in found if m[1] is not None and m[1].strip() != m[0].strip()}


def _found(pattern: str, text: str) -> list[str]:
    compiled = compile_pattern(pattern)
    return [(match[compiled.groups] or "").strip() for match in compiled.finditer(text, timeout=LIMIT)]


def _slow(pattern: str, text: str) -> SlowPatternError:
    return SlowPatternError(
        f"the pattern {pattern!r} took more than {LIMIT:g} s on a text of {len(text)} characters; write it "
        "without one repetition inside another"
    )
