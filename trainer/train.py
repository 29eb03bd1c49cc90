"""Contrastive pretraining on patches and counts: one loop, read from top to bottom.

    python -m trainer.train CONFIG.toml [--resume]

Everything random in a step follows from the seed and the number of the step, and the data from
the cursor, so a checkpoint is parameters, optimiser and two integers, and a resumed run goes on
exactly.
"""

from __future__ import annotations

import argparse
import csv
import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from shards.errors import BadInput, BadInputs
from shards.stream import Indices, Order, read_stream
from trainer.augment import drawn_views, restained, step_generator, thinned, views
from trainer.checkpoint import (
    check_resumable,
    checkpoints,
    read_meta,
    read_model_state,
    read_optimizer_state,
    write_checkpoint,
)
from trainer.config import OptimConfig, TrainConfig, read_config
from trainer.data import Loader, Vocabulary, dense_counts, expression
from trainer.embed import chosen_device, embed, half_precision
from trainer.loss import info_nce
from trainer.model import PairModel
from trainer.retrieval import random_batches, retrieval_lines

METRICS_FILE = "metrics.csv"
COLUMNS = (
    "step",
    "samples",
    "epoch",
    "loss",
    "lr",
    "temperature",
    "grad_norm",
    "r1_image_to_genes",
    "r1_genes_to_image",
    "val_r5_image_to_genes",
    "val_r5_genes_to_image",
    "samples_per_s",
)
VALIDATION_BATCH = 64
_STANDARDISE_ON = 4096  # cells from which each gene's mean and spread are taken


def train(
    config: TrainConfig, *, resume: bool = False, stop: Callable[[], bool] = lambda: False
) -> bool:
    """Train until `optim.steps`, or until `stop` says so at a step's end; True when done.

    Under `run.out`: `config.json`, `metrics.csv`, `tensorboard/` and `checkpoints/step-NNNNNN/`.
    """
    # --- data
    stream = read_stream(config.data, "train")
    vocabulary = Vocabulary.union(stream.panels)
    loader = Loader(stream, vocabulary)
    order = Order(len(stream), config.run.seed, stream.fingerprint)
    validation = _validation_loader(config, vocabulary)
    fov_um = loader.shown_um(config.model.fov_um)
    # A model goes on to see what it was trained on, whatever patches it meets later.
    config = config.model_copy(update={"model": config.model.model_copy(update={"fov_um": fov_um})})

    # --- model
    device = chosen_device(config.run.device)
    torch.manual_seed(config.run.seed)
    model = PairModel(len(vocabulary.genes), config.model, config.loss)
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p for p in model.parameters() if p.ndim >= 2],
                "weight_decay": config.optim.weight_decay,
            },
            # Biases, norms and the temperature are not pulled to zero.
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=config.optim.lr,
        betas=config.optim.betas,
    )

    # --- resume, or start
    folder = config.run.out / "checkpoints"
    found = checkpoints(folder)
    if found and not resume:
        raise BadInput(
            config.run.out,
            expected="a folder without checkpoints",
            found=found[-1].name,
            remedy="go on with --resume, or choose another run.out",
        )
    if found:
        meta = read_meta(found[-1])
        check_resumable(found[-1], meta, config, stream.fingerprint)
        step, cursor = meta.step, meta.cursor
        model.load_state_dict(read_model_state(found[-1]))
        model.to(device)
        optimizer.load_state_dict(read_optimizer_state(found[-1]))
    else:
        step, cursor = 0, 0
        if config.model.image_weights is not None:
            model.image.load(config.model.image_weights)
        _standardise(model, loader, order.indices(range(min(_STANDARDISE_ON, len(stream)))))
        model.to(device)
    config.run.out.mkdir(parents=True, exist_ok=True)
    (config.run.out / "config.json").write_text(config.model_dump_json(indent=1))
    print(
        f"{len(stream)} pairs, {len(vocabulary.genes)} genes, {device}; "
        f"steps {step} to {config.optim.steps}",
        flush=True,
    )

    if step >= config.optim.steps:
        return True

    # --- the loop
    measured_PG = loader.measured_PG.to(device)
    stopped = False
    batches = loader.training(
        order, cursor, config.data_loading.batch_size, config.data_loading.threads
    )
    with (
        SummaryWriter(str(config.run.out / "tensorboard"), purge_step=step + 1) as board,
        _open_metrics(config.run.out / METRICS_FILE, step) as metrics_file,
    ):
        metrics = csv.DictWriter(metrics_file, COLUMNS, restval="")
        model.train()
        timed_from, timed_samples = time.monotonic(), 0
        while step < config.optim.steps and not stopped:
            # What is random is drawn on the CPU, from the seed and the step alone.
            generator = step_generator(config.run.seed, step)
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))  # dropout
            batch = next(batches)
            n = len(batch.weight_B)
            view_B23 = drawn_views(
                n, config.data_loading, generator, patch_um=loader.fov_um, fov_um=fov_um
            )
            batch = thinned(batch, config.data_loading.keep_counts, generator).to(device)

            image_BCHW = views(batch.image_BHWC, view_B23, config.model.image_px)
            if loader.image == "he":
                image_BCHW = restained(image_BCHW, config.data_loading, generator)
            counts_BG = dense_counts(batch, len(vocabulary.genes))
            with half_precision(device):
                z_image_BD = model.embed_image(image_BCHW)
                z_gene_BD = model.embed_counts(counts_BG, measured_PG[batch.panel_B].float())
            loss = info_nce(z_image_BD, z_gene_BD, model.temperature, batch.weight_B)

            lr = learning_rate(step, config.optim)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
            if not math.isfinite(loss.item() * grad_norm.item()):
                raise BadInput(
                    f"step {step}, samples {stream.keys(batch.index_B.tolist()[:3])} …",
                    expected="a finite loss and gradient",
                    found=f"loss {loss.item()}, gradient norm {grad_norm.item()}",
                    remedy="lower optim.lr and start a new run with another run.out",
                )
            optimizer.step()
            step, cursor, timed_samples = step + 1, cursor + n, timed_samples + n

            # What is told, kept and checked.
            last = step == config.optim.steps
            row: dict[str, float] = {}
            every = config.run.validate_every
            if validation is not None and every is not None and (last or step % every == 0):
                row |= _validated(model, validation, config, device)
            if last or row or step % config.run.log_every == 0:
                seconds = time.monotonic() - timed_from
                row |= {
                    "step": step,
                    "samples": cursor,
                    "epoch": cursor / len(stream),
                    "loss": loss.item(),
                    "lr": lr,
                    "temperature": model.temperature.item(),
                    "grad_norm": grad_norm.item(),
                    **_in_batch_r1(z_image_BD, z_gene_BD),
                    "samples_per_s": timed_samples / seconds,
                }
                timed_from, timed_samples = time.monotonic(), 0
                metrics.writerow(row)
                metrics_file.flush()
                for name, value in row.items():
                    board.add_scalar(name, value, step)
                print(", ".join(f"{c} {row[c]:.4g}" for c in COLUMNS if c in row), flush=True)
            stopped = stop()
            if last or stopped or step % config.run.checkpoint_every == 0:
                write_checkpoint(
                    folder,
                    step=step,
                    cursor=cursor,
                    stream=stream.fingerprint,
                    model=model,
                    optimizer=optimizer,
                    config=config,
                    vocabulary=vocabulary,
                    keep=config.run.keep_checkpoints,
                )
    return step >= config.optim.steps


def learning_rate(step: int, optim: OptimConfig) -> float:
    """Of the update that `step` (from 0) makes: linear warm-up, then half a cosine to 0."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    done = (step - optim.warmup_steps) / (optim.steps - optim.warmup_steps)
    return optim.lr * (1 + math.cos(math.pi * done)) / 2


def _standardise(model: PairModel, loader: Loader, indices: Indices) -> None:
    expression_SG, measured_SG = [], []
    for some in np.array_split(indices, -(-len(indices) // 256)):
        batch = loader.read(some)
        expression_SG.append(expression(dense_counts(batch, len(loader.vocabulary.genes))))
        measured_SG.append(loader.measured_PG[batch.panel_B].float())
    model.gene.standardise(torch.cat(expression_SG), torch.cat(measured_SG))


def _validation_loader(config: TrainConfig, vocabulary: Vocabulary) -> Loader | None:
    if config.run.validate_every is None:
        return None
    stream = read_stream(config.data, "val")
    if len(stream) < VALIDATION_BATCH:
        raise BadInput(
            "run.validate_every",
            expected=f"at least {VALIDATION_BATCH} samples in the val split",
            found=f"{len(stream)}",
            remedy="assign a donor to val with [split] assign and curate again, or leave "
            "run.validate_every out",
        )
    return Loader(stream, vocabulary)


def _validated(
    model: PairModel, loader: Loader, config: TrainConfig, device: torch.device
) -> dict[str, float]:
    z_image, z_gene = embed(model, loader, config, device)
    batches = random_batches(len(z_image), VALIDATION_BATCH, seed=0)
    lines = retrieval_lines("model", z_image, z_gene, batches)
    return {f"val_r5_{line.direction}": line.r_at_5 for line in lines if line.scope == "batch"}


def _in_batch_r1(z_image_BD: torch.Tensor, z_gene_BD: torch.Tensor) -> dict[str, float]:
    similarity_BB = z_image_BD.detach() @ z_gene_BD.detach().T
    own_B = torch.arange(len(similarity_BB), device=similarity_BB.device)
    return {
        "r1_image_to_genes": (similarity_BB.argmax(dim=1) == own_B).float().mean().item(),
        "r1_genes_to_image": (similarity_BB.argmax(dim=0) == own_B).float().mean().item(),
    }


def _open_metrics(path: Path, step: int) -> IO[str]:
    """The metrics file for appending, without the rows of steps that are done again."""
    kept: list[dict[str, str]] = []
    if step > 0 and path.exists():
        with path.open(newline="") as f:
            kept = [row for row in csv.DictReader(f) if int(row["step"]) <= step]
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS)
        writer.writeheader()
        writer.writerows(kept)
    return path.open("a", newline="")


def main(arguments: Sequence[str] | None = None) -> int:
    """0 done; 2 bad input; 3 stopped by a signal after saving, to be resumed."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.toml")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    options = parser.parse_args(arguments)
    caught: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: caught.append(n))
    try:
        done = train(read_config(options.config), resume=options.resume, stop=lambda: bool(caught))
    except (BadInput, BadInputs) as error:
        print(error, file=sys.stderr)
        return 2
    if not done:
        print("stopped by a signal; go on with --resume", file=sys.stderr)
    return 0 if done else 3


if __name__ == "__main__":
    sys.exit(main())
