"""Batches compared bit by bit, and kept beyond the step that they are valid for."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from trainer.batch import Batch


def copied(batch: Batch) -> Batch:
    near = batch.neighbors
    return replace(batch, neighbors=near and replace(near, **_clones(near)), **_clones(batch))


def _clones(record: Any) -> dict[str, torch.Tensor]:
    values = {f.name: getattr(record, f.name) for f in fields(record)}
    return {name: v.clone() for name, v in values.items() if isinstance(v, torch.Tensor)}


def assert_same(one: Batch, other: Batch) -> None:
    """Equal in every value and every type."""
    np.testing.assert_array_equal(one.index_B, other.index_B)
    _assert_same_tensors(one, other)
    assert [(f.index, f.message) for f in one.faults] == [
        (f.index, f.message) for f in other.faults
    ]
    assert (one.neighbors is None) == (other.neighbors is None)
    if one.neighbors is not None:
        _assert_same_tensors(one.neighbors, other.neighbors)


def _assert_same_tensors(one: Any, other: Any) -> None:
    ours, theirs = _clones(one), _clones(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
