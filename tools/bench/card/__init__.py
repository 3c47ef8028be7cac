"""The stages of tools/bench/gpu.py: what is measured, and where results are kept."""
