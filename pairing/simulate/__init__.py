"""Xenium bundles and slides with known truth."""

from pairing.simulate.params import BundleParams, PanelParams, SimulationParams, SlideParams
from pairing.simulate.simulate import simulate
from pairing.simulate.tile import labelled_tile

__all__ = [
    "BundleParams",
    "PanelParams",
    "SimulationParams",
    "SlideParams",
    "labelled_tile",
    "simulate",
]
