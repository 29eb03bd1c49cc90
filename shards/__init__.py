"""The contract at the bottom: samples, panels, manifests, datasets and the artifacts that hold them."""
