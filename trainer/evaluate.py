"""Retrieval on held-out donors, beside chance, shuffled pairs and a ridge.

    python -m trainer.evaluate CHECKPOINT DATASET --out DIR [--split test]

`DIR/evaluation.json` holds every figure, `DIR/batches.parquet` the batches that were scored, so
that anything else can be scored on exactly the same ones.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.artifact import write_atomically
from shards.dataset import read_dataset
from shards.errors import BadInput, BadInputs
from shards.remote import Location, location
from shards.schema import SPLITS, Record, Split
from shards.stream import read_stream
from trainer.baselines import ridge_embeddings
from trainer.checkpoint import read_meta
from trainer.config import Device
from trainer.data import Loader
from trainer.embed import chosen_device, embed, read_model
from trainer.retrieval import (
    TIE_RULE,
    Retrieval,
    chance_line,
    random_batches,
    retrieval_lines,
)

BATCH_SIZE: Final = 64
SEED: Final = 0  # of the batches and of the shuffled pairs
EVALUATION_FILE: Final = "evaluation.json"
BATCHES_FILE: Final = "batches.parquet"


class Evaluation(Record):
    """`evaluation.json`."""

    schema_version: Literal[1] = 1
    checkpoint: str  # fingerprint
    step: int
    dataset: str  # fingerprint
    split: Split
    n_samples: int
    n_samples_by_donor: dict[str, int]
    genes_unknown_to_model: dict[str, int]  # panel_id -> how many of its genes
    batch_size: int
    n_batches: int
    n_left_over: int  # samples in no batch
    seed: int
    tie_rule: str
    retrieval: tuple[Retrieval, ...]
    not_evaluated: tuple[str, ...]  # what is missing, and why


def evaluate(
    checkpoint: Path,
    dataset: Location,
    out: Path,
    *,
    split: Split = "test",
    device: Device = "auto",
) -> Evaluation:
    """Embed the split, score it, write `evaluation.json` and `batches.parquet` under `out`.

    Raises BadInput where the split is empty or holds no whole batch.
    """
    meta = read_meta(checkpoint)
    stream = read_stream([dataset], split)
    if len(stream) < BATCH_SIZE:
        raise BadInput(
            dataset,
            expected=f"at least {BATCH_SIZE} samples in the {split} split",
            found=str(len(stream)),
            remedy=f"assign a donor to {split} with [split] assign and curate again",
        )
    model, vocabulary, config = read_model(checkpoint)
    where = chosen_device(device)
    loader = Loader(stream, vocabulary, neighbors_k=config.model.neighbors_k)
    z_image, z_gene = embed(model.to(where), loader, config, where)

    batches = random_batches(len(stream), BATCH_SIZE, SEED)
    shuffled = np.random.Generator(np.random.Philox(SEED + 1)).permutation(len(stream))
    lines = retrieval_lines("model", z_image, z_gene, batches)
    lines += retrieval_lines("shuffled_pairs", z_image, z_gene[shuffled], batches)
    not_evaluated = []
    if len(train := read_stream([dataset], "train")):
        lines += retrieval_lines("ridge", *ridge_embeddings(train, stream), batches)
    else:
        not_evaluated.append("ridge: the dataset has no train split to fit it on")
    lines += [
        chance_line(line.scope, line.direction, line.n_candidates)
        for line in lines
        if line.method == "model"
    ]
    evaluation = Evaluation(
        checkpoint=meta.fingerprint,
        step=meta.step,
        dataset=read_dataset(dataset)[0].fingerprint,
        split=split,
        n_samples=len(stream),
        n_samples_by_donor=dict(
            sorted(Counter(stream.table(["donor"])["donor"].to_pylist()).items())
        ),
        genes_unknown_to_model={p.panel_id: len(vocabulary.places(p)[1]) for p in stream.panels},
        batch_size=BATCH_SIZE,
        n_batches=len(batches),
        n_left_over=len(stream) - batches.size,
        seed=SEED,
        tie_rule=TIE_RULE,
        retrieval=tuple(lines),
        not_evaluated=tuple(not_evaluated),
    )
    key = stream.table(["key"])["key"].combine_chunks()
    out.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table(
            {
                "batch": np.repeat(np.arange(len(batches)), BATCH_SIZE),
                "position": np.tile(np.arange(BATCH_SIZE), len(batches)),
                "key": key.take(pa.array(batches.ravel())),
            }
        ),
        out / BATCHES_FILE,
    )
    write_atomically(out / EVALUATION_FILE, evaluation.model_dump_json(indent=1).encode())
    return evaluation


def main(arguments: Sequence[str] | None = None) -> int:
    """0 done; 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("dataset", metavar="DATASET", help="folder or URL")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(arguments)
    try:
        evaluation = evaluate(
            options.checkpoint,
            location(options.dataset),
            options.out,
            split=options.split,
            device=options.device,
        )
    except (BadInput, BadInputs) as error:
        print(error, file=sys.stderr)
        return 2
    for line in evaluation.retrieval:
        print(
            f"{line.method:15} {line.scope:6} {line.direction:15} R@1 {line.r_at_1:.3f} "
            f"R@5 {line.r_at_5:.3f} R@10 {line.r_at_10:.3f} median rank {line.median_rank:.1f} "
            f"of {line.n_candidates}"
        )
    print(options.out / EVALUATION_FILE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
