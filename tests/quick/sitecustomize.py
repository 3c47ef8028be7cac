"""Python reads this at the start of every process that tests start: transformers gets the list of packages from a file.

It asks for it when it is imported, and the answer takes 1.4 s of a processor: all files of all installed packages are read.
"""

import os
import sys

LIST = os.environ.get("GSPO_MM_TESTS_PACKAGES")


class BeforeTransformers:
    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> None:
        if name != "transformers":
            return
        import importlib.metadata
        import json

        sys.meta_path.remove(cls)
        with open(str(LIST)) as file:  # noqa: PTH123  (pathlib would be imported for it)
            found = json.load(file)
        importlib.metadata.packages_distributions = lambda: found


if LIST and os.path.exists(LIST):  # noqa: PTH110
    sys.meta_path.insert(0, BeforeTransformers)
