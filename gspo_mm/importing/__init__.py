"""`gspo-mm import`: configs of TRL, Unsloth, ms-swift, verl and AReaL as one of ours.

    source.py       a Python script, a shell script or a YAML or JSON file -> whose it is, and its keys with their values
    translation.py  keys that are taken over, with their reasons for and against -> YAML
    trl.py, unsloth.py, swift.py, verl.py, areal.py   what the keys of each mean here

Scripts are read, never run.
"""

from gspo_mm.importing.source import read_source
from gspo_mm.importing.translation import Translation, translated

__all__ = ["Translation", "read_source", "translated"]
