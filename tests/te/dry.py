"""tools/bench/gpu.py with what its parts import in a dry run: to be loaded once and forked (tests/forked.py)."""

from tools.bench.gpu import app, load_stand_in_for_te

load_stand_in_for_te()

if __name__ == "__main__":
    app()
