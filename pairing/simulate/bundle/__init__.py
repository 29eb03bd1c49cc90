"""Write a section as a Xenium bundle, in the layout of any release of the analysis software."""

from pairing.simulate.bundle.cells import cell_id_strings
from pairing.simulate.bundle.morphology import STAINS
from pairing.simulate.bundle.write import write_bundle, zip_bundle

__all__ = ["STAINS", "cell_id_strings", "write_bundle", "zip_bundle"]
