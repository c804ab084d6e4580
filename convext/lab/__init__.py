"""The training lab: what a network does while it trains, and experiments that change one thing."""

from convext.lab.activation_stats import ActivationStats, LayerStats

__all__ = ["ActivationStats", "LayerStats"]
