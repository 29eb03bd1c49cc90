"""Training from a dataset behind a URL: the steps of one in a folder, stopped and gone on with."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.errors import BadInputs
from shards.remote import RemotePath, remote_path
from tests.s3 import Line
from trainer.checkpoint import checkpoints, read_meta
from trainer.config import TrainConfig, read_config
from trainer.train import train

from .conftest import write_config
from .test_exact import rows_of

BLOCKS = {"reading": "block", "block": {"pieces": 4, "piece_samples": 16}}


@pytest.mark.slow
def test_steps_from_a_url_and_from_a_folder_are_the_same(
    tiny_dataset: Path, bucket: str, s3: Line, tmp_path: Path
) -> None:
    remote = remote_path(bucket)
    for path in sorted(p for p in tiny_dataset.rglob("*") if p.is_file()):
        (remote / path.relative_to(tiny_dataset).as_posix()).upload(path)

    def config(out: str, dataset: Path | RemotePath, workers: int) -> TrainConfig:
        loading = {**BLOCKS, "workers": workers}
        return read_config(write_config(tmp_path, dataset, out, 16, data_loading=loading))

    train(config("folder", tiny_dataset, 0))
    far = config("url", remote, 1)
    assert far.data == (remote,)
    assert not train(far, stop=lambda: len(rows_of(tmp_path / "url")) >= 5)
    assert train(far, resume=True)
    assert rows_of(tmp_path / "url") == rows_of(tmp_path / "folder")
    ends = [checkpoints(tmp_path / out / "checkpoints")[-1] for out in ("url", "folder")]
    assert read_meta(ends[0]).files["model.pt"] == read_meta(ends[1]).files["model.pt"]


def test_checkpoints_behind_a_url_are_refused(tiny_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputs, match="not there yet"):
        read_config(write_config(tmp_path, tiny_dataset, "x", 4, run={"out": "s3://bucket/run"}))
