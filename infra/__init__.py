"""Where and how the flows are deployed; shipped beside the code so that `cellpair deploy` finds it."""
