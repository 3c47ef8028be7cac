"""Policy weights -> rollout engine."""
