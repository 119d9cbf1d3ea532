"""Reasoning and acting: games, agents, solvers."""

from lib.reasoning.coding_game import (
    markov_coding_game,
    noisy_gridworld,
    receiver_belief,
    soft_value_iteration,
    uniform_quantiser,
)

__all__ = [
    "markov_coding_game",
    "noisy_gridworld",
    "receiver_belief",
    "soft_value_iteration",
    "uniform_quantiser",
]
