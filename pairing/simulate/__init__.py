"""Xenium bundles and slides with known truth."""

from pairing.simulate.params import BundleParams, SimulationParams, SlideParams
from pairing.simulate.simulate import simulate
from pairing.simulate.tile import labelled_tile

__all__ = ["BundleParams", "SimulationParams", "SlideParams", "labelled_tile", "simulate"]
