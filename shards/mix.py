"""Which samples an epoch holds and how often: caps and weights by run, donor or tissue."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from shards.errors import BadInput
from shards.index import Shard
from shards.order import Indices
from shards.schema import Record

Kind = Literal["run", "donor", "tissue"]
_KINDS: Final[tuple[Kind, ...]] = ("run", "donor", "tissue")


class Mix(Record):
    """At most `cap` samples of each run, donor or tissue, and how often a sample comes by `weight`.

    A weight of 0 leaves samples out, before caps are applied; what is not named has weight 1.
    Weights of several kinds multiply. Caps apply in the order run, donor, tissue, each on what the
    earlier left. Donors go by their canonical names.
    """

    cap: dict[Kind, Annotated[int, Field(ge=1)]] = {}
    weight: dict[Kind, dict[str, Annotated[int, Field(ge=0)]]] = {}


ALL_ONCE: Final = Mix()


@dataclass(frozen=True, slots=True)
class Parts:
    """The samples of a stream as rows of shards: part p is the first `n_P[p]` rows of a shard.

    Parts lie one after the other in the index. A shard of weight w is w parts in a row, of which
    `copy_P` counts the earlier ones.
    """

    shard_P: Indices
    n_P: Indices
    copy_P: Indices
    ends_P: Indices

    @classmethod
    def of(cls, n_kept: Sequence[int] | Indices, copies: Sequence[int] | Indices) -> Parts:
        """The first `n_kept` rows of each shard, `copies` times."""
        shard_P = np.repeat(np.arange(len(copies)), copies)
        n_P = np.asarray(n_kept, dtype=np.int64)[shard_P]
        first_P = (np.cumsum(copies) - np.asarray(copies))[shard_P]
        return cls(shard_P, n_P, np.arange(len(shard_P)) - first_P, np.cumsum(n_P))

    def __len__(self) -> int:
        """How many samples, copies among them."""
        return int(self.ends_P[-1]) if len(self.ends_P) else 0

    def locate(self, indices: Indices) -> tuple[Indices, Indices]:
        """Shard and row of each index. Raises IndexError on one that is none."""
        part = self._part_of(indices)
        return self.shard_P[part], indices - self.ends_P[part] + self.n_P[part]

    def sample_of(self, indices: Indices) -> Indices:
        """The same number for all copies of a sample: the index of the first."""
        part = self._part_of(indices)
        first: Indices = indices - self.copy_P[part] * self.n_P[part]
        return first

    def _part_of(self, indices: Indices) -> npt.NDArray[np.intp]:
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"indices {indices.min()} … {indices.max()} of {len(self)} samples")
        return np.searchsorted(self.ends_P, indices, side="right")


def mixed(
    shards: Sequence[Shard], aliases: Mapping[str, str], mix: Mix
) -> tuple[list[int], list[int]]:
    """How many of the first rows of each shard are taken, and how often.

    Within a group that has more samples than its cap, each shard keeps a share in proportion, by
    largest remainder, ties in the order of the shards. Samples of a shard are in hashed order, so
    its first ones are a fair sample. Raises BadInput on a name that no shard has, and on a cap by
    tissue where a run has none.
    """
    names: dict[Kind, Callable[[Shard], str | None]] = {
        "run": lambda shard: shard.manifest.run,
        "donor": lambda shard: aliases.get(shard.info.donor, shard.info.donor),
        "tissue": lambda shard: shard.manifest.tissue,
    }
    copies = [1] * len(shards)
    for kind, weights in mix.weight.items():
        of_shard = [names[kind](shard) for shard in shards]
        known = {name for name in of_shard if name is not None}
        for stranger in sorted(weights.keys() - known):
            raise BadInput(
                f"data_loading.weight.{kind}",
                expected=f"one of {', '.join(sorted(known)) or 'none: there are none'}",
                found=repr(stranger),
                remedy="correct the name, or leave it out",
            )
        for s, name in enumerate(of_shard):
            copies[s] *= 1 if name is None else weights.get(name, 1)
    n_kept = [shard.n_samples if times else 0 for shard, times in zip(shards, copies, strict=True)]
    for kind in _KINDS:
        if kind in mix.cap:
            groups: dict[str, list[int]] = {}
            for s, shard in enumerate(shards):
                if n_kept[s]:
                    groups.setdefault(_named(names[kind](shard), kind, shard), []).append(s)
            for members in groups.values():
                _allot(n_kept, members, mix.cap[kind])
    return n_kept, copies


def _named(name: str | None, kind: Kind, shard: Shard) -> str:
    if name is None:
        raise BadInput(
            f"data_loading.cap.{kind}",
            expected=f"a {kind} of every run",
            found=f"run {shard.manifest.run} without one",
            remedy=f"cap by run or donor, or curate the run with its {kind}",
        )
    return name


def _allot(n_kept: list[int], members: list[int], cap: int) -> None:
    total = sum(n_kept[s] for s in members)
    if total <= cap:
        return
    shares = [divmod(n_kept[s] * cap, total) for s in members]
    left = cap - sum(share for share, _ in shares)
    # sorted is stable: of equal remainders the earlier shard comes first.
    by_remainder = sorted(range(len(members)), key=lambda i: -shares[i][1])
    for i, s in enumerate(members):
        n_kept[s] = shares[i][0]
    for i in by_remainder[:left]:
        n_kept[members[i]] += 1
