"""The stages only look to their left, megatron stays in its rooms, and nothing records routed experts."""

import ast
import re
from pathlib import Path

import pytest

from gspo_mm.families.table import FAMILIES

PACKAGE = Path(__file__).parents[2] / "gspo_mm"
# one order, without exceptions: a package knows those before it only
ORDER = [
    "types", "config", "runtime", "hf", "families", "plan", "serving", "data", "environment", "rollout", "reward", "advantage",
    "batch", "loss", "policy", "sync", "checkpoint", "observe", "evaluate", "inputs", "stages", "harness", "sft", "train",
    "importing", "commands", "cli",
]  # fmt: skip
PLACE = {package: place for place, package in enumerate(ORDER)}
MEGATRON_ROOMS = {"policy", "families", "sync", "checkpoint"}
SGLANG_FILES = {"serving/cpu_platform.py", "serving/cpu_delta.py"}  # imported by the servers themselves


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere in it, by their full names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def stage_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p.parent != PACKAGE or p.name != "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_package_imports_only_those_to_its_left(path: Path) -> None:
    own = stage_of(path)
    for module in imports(path):
        parts = module.split(".")
        if parts[0] == "gspo_mm" and len(parts) > 1 and parts[1] in PLACE:
            assert PLACE[parts[1]] <= PLACE[own], f"{own} imports {module}, which stands to its right"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_megatron_and_sglang_stay_in_their_rooms(path: Path) -> None:
    roots = {module.split(".")[0] for module in imports(path)}
    if stage_of(path) not in MEGATRON_ROOMS:
        assert not roots & {"megatron", "transformer_engine", "apex"}
    if str(path.relative_to(PACKAGE)) not in SGLANG_FILES:
        assert "sglang" not in roots


def test_every_module_has_a_place_in_the_order() -> None:
    assert {stage_of(path) for path in FILES} == set(PLACE)


def words(path: Path) -> set[str]:
    """Strings of a file that may be keys or parts of names: those without a blank."""
    nodes = ast.walk(ast.parse(path.read_text()))
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {text for text in texts if not any(sign.isspace() for sign in text)}


def test_nothing_outside_of_families_names_a_family() -> None:
    makers = {re.split(r"\d", family)[0] for family in FAMILIES}  # qwen, glm, gpt_oss
    named = {
        str(path): word
        for path in FILES
        if stage_of(path) != "families"
        for word in words(path)
        if any(maker in word.lower() for maker in makers)
    }
    assert named == {}
    assert any("qwen" in word for word in words(PACKAGE / "families" / "table.py"))


def test_a_family_is_one_short_file() -> None:
    files = [
        PACKAGE.parent / f"{row.code.partition(':')[0].replace('.', '/')}.py" for row in FAMILIES.values()
    ]
    for file in [*files, PACKAGE.parent / "tests" / "toy_family.py"]:
        assert len(file.read_text().splitlines()) < 350, file


@pytest.mark.parametrize("word", ["routed_experts", "router_replay", "routing_replay"])
def test_no_routed_expert_is_recorded_anywhere(word: str) -> None:
    """GSPO needs no routing replay: nothing asks for, sends or keeps the experts that a token was routed to."""
    # a config.json says n_routed_experts of how many there are
    texts = {str(path): path.read_text().lower().replace('"n_routed_experts"', "") for path in FILES}
    assert not [path for path, text in texts.items() if word in text]
