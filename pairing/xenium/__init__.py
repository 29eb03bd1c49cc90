"""Open a Xenium run, whatever it is stored as; the only place that knows a version difference."""

from pairing.xenium.features import CATEGORY_NAMES
from pairing.xenium.run import XeniumRun, open_xenium
from pairing.xenium.transcripts import TranscriptBatch

__all__ = ["CATEGORY_NAMES", "TranscriptBatch", "XeniumRun", "open_xenium"]
