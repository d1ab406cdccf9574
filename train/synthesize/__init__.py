"""Data for post-training: stages that generate, verify, filter and pair examples: docs/synthesis.md."""
