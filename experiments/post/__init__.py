"""Recipes of post-training."""
