"""The parts of tools/bench/ablation.py: which runs there are, one of them, routing replay, and what is made of their results."""
