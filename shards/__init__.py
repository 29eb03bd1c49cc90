"""The contract at the bottom: samples, panels, manifests, datasets and their artifacts."""
