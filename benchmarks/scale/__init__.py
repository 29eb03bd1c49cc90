"""Curation by size: from tens of thousands of cells to a million, and what a corpus then costs."""
