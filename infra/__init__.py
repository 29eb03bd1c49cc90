"""Where and how the flows are deployed; a package, so that `cellpair deploy` finds its files."""
