"""Where the Xenium frame lies on the slide: given alignments, gates and the verdict."""
