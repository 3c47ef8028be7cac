"""Messages that configs/troubleshooting.md explains are messages of this version."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def texts(path: Path) -> str:
    """All strings of a file, one a line; what is filled into one is left out of it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(part.value) for part in node.values if isinstance(part, ast.Constant)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return "\n".join(found)


def test_every_message_that_is_explained_is_one_of_ours() -> None:
    page = (ROOT / "configs" / "troubleshooting.md").read_text()
    told = re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)
    said = "\n".join(texts(path) for path in (ROOT / "gspo_mm").rglob("*.py"))
    assert len(told) > 15
    assert [message for message in told if message not in said] == []
