"""The options that rollout.sglang.extra_args refuses, held against those that the installed SGLang has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from gspo_mm.config import server_options
from gspo_mm.serving import cpu

_LIST = """
import argparse
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
for action in parser._actions:
    print("option", *(name[2:] for name in action.option_strings if name.startswith("--")))
"""


def test_refused_options_exist_and_no_other_is_taken_for_the_beginning_of_one(tmp_path: Path) -> None:
    environment = os.environ | cpu.environment(tmp_path)
    done = subprocess.run([sys.executable, "-c", _LIST], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("option ")]
    names = {name for line in lines for name in line}
    assert len(names) > 300
    for name in {**server_options._OURS, **server_options._REFUSED}:
        found = [each for each in names if each.startswith(name)] if name.endswith("-") else names & {name}
        assert found, f"SGLang has no option {name} any longer"
    assert [name for name in names if "it is short" in server_options.refusal(name, "x")] == []
