"""Xenium bundles and slides with known truth."""
