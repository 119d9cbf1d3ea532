"""Reasoning and acting: games, agents, solvers."""

from lib.reasoning.coding_game import (
    markov_coding_game,
    noisy_gridworld,
    receiver_belief,
    soft_value_iteration,
    uniform_quantiser,
)
from lib.reasoning.continuous_thought import LatentAttention, continuous_thought

__all__ = [
    "LatentAttention",
    "continuous_thought",
    "markov_coding_game",
    "noisy_gridworld",
    "receiver_belief",
    "soft_value_iteration",
    "uniform_quantiser",
]
