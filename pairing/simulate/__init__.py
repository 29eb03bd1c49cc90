"""Xenium bundles and slides with known truth."""

from pairing.simulate.params import SimulationParams
from pairing.simulate.simulate import simulate
from pairing.simulate.tile import labelled_tile

__all__ = ["SimulationParams", "labelled_tile", "simulate"]
