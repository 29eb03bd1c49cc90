"""Nuclei on H&E slides: Cellpose networks, blocks and the weights that ship."""

import logging

# At its import cellpose warns that an optional network, which nothing here uses, is not installed.
logging.getLogger("cellpose").setLevel(logging.ERROR)
