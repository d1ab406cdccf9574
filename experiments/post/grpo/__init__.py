"""GRPO: whether it learns, and how fast it is."""
