"""Prompts -> groups of sampled answers."""
