"""What is said of a sample that a run does not use."""

from __future__ import annotations


class BadSample(Exception):  # noqa: N818  (a verdict on data, not a fault of the program)
    """This sample cannot be used. `reason` is one of a few words to count by, `detail` names the particulars."""

    def __init__(self, reason: str, detail: str = "") -> None:
        detail = detail.encode(
            errors="backslashreplace"
        ).decode()  # names in a tar need not be UTF-8, logs must
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class LeftOut(BadSample):
    """This sample is sound, but the config does not want it. Counted, and neither logged nor held against the data."""
