"""Nuclei on H&E slides: Cellpose networks, blocks and the weights that ship."""
