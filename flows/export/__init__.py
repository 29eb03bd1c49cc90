"""A dataset in the layouts of other tools: h5ad, SpatialData, and open_clip's WebDataset."""
