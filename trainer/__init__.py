"""Pretrains and evaluates a contrastive image/gene model on the shards."""
