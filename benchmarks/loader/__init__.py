"""How close reading comes to the decoder's own speed, beside other loaders."""
