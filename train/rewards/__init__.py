"""Rewards of generated texts: plain functions, built in or from a file, and how they are called: docs/rewards.md."""

from train.rewards.functions import RewardFunction, check_columns, combine, score
from train.rewards.loading import BUILT_IN, close_rewards, load_reward

__all__ = ["BUILT_IN", "RewardFunction", "check_columns", "close_rewards", "combine", "load_reward", "score"]
