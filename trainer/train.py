"""Contrastive pretraining on patches and counts: one loop, read from top to bottom.

    python -m trainer.train CONFIG.toml [--resume | --init-from CHECKPOINT] [--profile STEPS]
    torchrun --nproc-per-node 8 -m trainer.train CONFIG.toml --resume

Everything random in a step follows from the seed and the number of the step, and the data from
the cursor, so a checkpoint is parameters, optimiser and two integers, and a resumed run goes on
exactly.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from shards.errors import BadInput, BadInputs
from shards.lock import hold
from shards.mix import Mix
from shards.order import Indices, share_of
from shards.stream import read_stream
from shards.vocabulary import Vocabulary
from trainer.augment import augmented, draws, masked_genes, step_generator, thinned
from trainer.batch import Batch, GenePlaces
from trainer.caching import Embedded, backward_in_chunks
from trainer.checkpoint import (
    CheckpointWriter,
    TrainState,
    best_score,
    check_resumable,
    checkpoints,
    read_meta,
    read_part,
)
from trainer.config import LossConfig, OptimConfig, TrainConfig, read_config
from trainer.data import Loader
from trainer.distributed import start_world
from trainer.embed import (
    VALIDATION_BATCH,
    autocast,
    chosen_device,
    chosen_precision,
    gene_input,
    validated,
)
from trainer.faults import not_finite, too_many, write_down
from trainer.inherit import inherit, inherited_genes
from trainer.metrics import Clock, Metrics, in_batch_r1, runs_in_batch
from trainer.model import Embedded as PairEmbedded
from trainer.model import PairModel

_FIT_ON = 4096  # cells from which each gene's mean and spread are taken


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    init_from: Path | None = None,
    profile_steps: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train until `optim.steps`, or until `stop` says so at a step's end; True when done.

    Under `run.out`: `config.json`, `metrics.csv`, `tensorboard/` and `checkpoints/step-NNNNNN/`.
    With `profile_steps` it ends after so many steps and prints where their time went.
    """
    with ExitStack() as stack:
        world = stack.enter_context(start_world(chosen_device(config.run.device)))
        device, first = world.device, world.rank == 0
        # --- data
        loading = config.data_loading
        mix = Mix(cap=loading.cap, weight=loading.weight)
        stream = read_stream(config.data, "train", mix, verify=loading.verify)
        vocabulary = Vocabulary.union(stream.panels, inherited_genes(init_from))
        loader = Loader(stream, vocabulary, neighbors_k=config.model.neighbors_k)
        places = loader.places.to(device)
        order = stream.order(
            config.run.seed,
            reading=loading.reading,
            balanced=loading.balanced,
            pieces=loading.block.pieces,
            piece_samples=loading.block.piece_samples,
        )
        validation = _validation_loader(config, vocabulary) if first else None
        fov_um = loader.shown_um(config.model.fov_um)
        # A model goes on to see what it was trained on, whatever patches it meets later; and a
        # length in epochs is one in steps from here on.
        optim, n_steps = in_steps(config.optim, -(-order.n // loading.batch_size))
        shown = config.model.model_copy(update={"fov_um": fov_um})
        config = config.model_copy(update={"model": shown, "optim": optim})

        # --- model
        torch.manual_seed(config.run.seed)
        n_genes = len(vocabulary.genes)
        model = PairModel(n_genes, len(vocabulary.species), config.model, config.loss)
        optimizer = torch.optim.AdamW(model.parameter_groups(optim), lr=optim.lr, betas=optim.betas)
        precision = chosen_precision(optim.precision, device)
        scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)

        # --- resume, or start
        if first:
            stack.enter_context(hold(config.run.out / ".lock", f"training in {config.run.out}"))
        world.any(False)  # nobody goes on before the folder is ours
        folder = config.run.out / "checkpoints"
        found = checkpoints(folder)
        if found and not resume:
            raise BadInput(
                config.run.out,
                expected="a folder without checkpoints",
                found=found[-1].name,
                remedy="go on with --resume, or choose another run.out",
            )
        step, cursor, n_bad = 0, 0, 0
        if found:
            meta = read_meta(found[-1])
            check_resumable(found[-1], meta, config, stream.fingerprint)
            step, cursor, n_bad = meta.step, meta.cursor, meta.n_bad_samples
            model.load_state_dict(read_part(found[-1], "model"))
        else:
            if config.model.image_weights is not None:
                model.image.load(config.model.image_weights)
            read = loader.read if loading.max_bad_samples == 0 else loader.read_sound
            _fit(model, loader.places, read, order.batch(range(min(_FIT_ON, order.n))))
            if config.model.rank is not None and config.model.rank.means is not None:
                n_without = model.set_means(vocabulary.genes, config.model.rank.means)
                print(f"{n_without} of {n_genes} genes are not in {config.model.rank.means}")
            if init_from is not None:
                inherit(model, n_genes, init_from)
        model.to(device)
        world.broadcast(model)
        ema = None
        if optim.ema is not None:
            average = get_ema_multi_avg_fn(optim.ema)  # type: ignore[no-untyped-call]  # torch's
            ema = AveragedModel(model, multi_avg_fn=average)
        parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scaler": scaler}
        parts |= {"ema": ema} if ema is not None else {}
        for name in parts.keys() - {"model"} if found else ():
            parts[name].load_state_dict(read_part(found[-1], name))
        if config.run.checkpoint_activations:
            model.image.checkpoint_activations()
        if config.run.compile:
            model.image.compile()
            model.gene.compile()
        if first:
            (config.run.out / "config.json").write_text(config.model_dump_json(indent=1))
            print(
                f"{order.n} pairs of {len(stream.runs)} runs, {len(vocabulary.genes)} genes, "
                f"{world.size} x {device}; steps {step} to {n_steps}",
                flush=True,
            )
            if loading.batch_size > order.n:
                print(
                    f"a batch of {loading.batch_size} is more than there is: an epoch is one batch"
                )
        if step >= n_steps:
            return True
        first_step, last_step = step, n_steps
        if profile_steps is not None:  # after one that warms up
            last_step = min(n_steps, step + 1 + profile_steps)

        # --- the loop
        clock = Clock(profile_steps is not None, device)
        metrics = None
        if first:
            metrics = stack.enter_context(closing(Metrics(config.run.out, step)))
        writer = None
        if first and profile_steps is None:
            writer = stack.enter_context(CheckpointWriter(folder, config.run.keep_checkpoints))
        batches = stack.enter_context(
            closing(loader.training(order, cursor, loading, world.rank, world.size))
        )
        saved_step, best_val_r5, stopped = step, best_score(folder), False
        # What a forward pass leaves behind whether its step is taken or not.
        statistics = [b for m in model.modules() if isinstance(m, _BatchNorm) for b in m.buffers()]
        before = [b.clone() for b in statistics]

        def save(val_r5: float | None = None) -> None:
            if writer is not None:
                states = {name: part.state_dict() for name, part in parts.items()}
                writer.save(
                    TrainState(
                        step, cursor, n_bad, stream.fingerprint, val_r5, states, config, vocabulary
                    )
                )

        model.train()
        try:
            while step < last_step and not stopped:
                for kept, now in zip(before, statistics, strict=True):
                    kept.copy_(now)
                batch = next(batches)
                clock.add("waiting for data", batch.waited_s)
                n_global = len(batch.positions)
                with clock.part("copying to the device"):
                    chunks = [chunk.to(device) for chunk in batch.chunks]
                weight_B = torch.cat([chunk.weight_B for chunk in chunks])
                index_B = np.concatenate([chunk.index_B for chunk in chunks])
                sample_B = torch.from_numpy(stream.sample_of(index_B.clip(min=0))).to(device)
                faults = [fault for chunk in chunks for fault in chunk.faults]
                write_down(config.run.out, world.rank, step, stream, faults)
                # One exchange, so that all ranks refuse and stop at the same step.
                told = torch.tensor([weight_B.sum().item(), len(faults), stop()])
                n_weighed, n_faults, n_stopping = world.total(told.double()).tolist()
                stopped = n_stopping > 0
                if n_bad + n_faults > loading.max_bad_samples:
                    n_found = n_bad + int(n_faults)
                    raise too_many(config.run.out, n_found, loading.max_bad_samples, faults)

                # What happens to a sample is drawn for the batch of all ranks; these are ours.
                own = share_of(range(n_global), world.rank, world.size)
                drawn = draws(n_global, loading, config.run.seed, step)
                drawn = drawn.rows(own.start, own.stop, len(weight_B))
                ends = np.cumsum([len(chunk.weight_B) for chunk in chunks])

                def embed(i: int) -> Embedded:
                    chunk, end = chunks[i], int(ends[i])
                    rows = drawn.rows(end - len(chunk.weight_B), end)
                    # By the place in the batch of all ranks, which no other chunk shares.
                    part = own.start + end
                    generator = step_generator(config.run.seed, step, part, device)
                    torch.manual_seed(generator.initial_seed())  # dropout
                    with clock.part("augmentation"):
                        image_BCHW = augmented(
                            chunk.image_BHWC,
                            rows,
                            patch_um=loader.fov_um,
                            fov_um=fov_um,
                            size_px=config.model.image_px,
                            restain=loader.image == "he",
                        )
                        if loading.keep_counts < 1:
                            kept_N = thinned(chunk.count_N, chunk.row_N, rows.keep_B, generator)
                            chunk = replace(chunk, count_N=kept_N)
                        genes = gene_input(chunk, places, config.model.neighbors_k)
                        masked_BG = None
                        if config.loss.masked_share:
                            masked_BG = masked_genes(
                                genes.measured_BG, config.loss.masked_share, generator
                            )
                    with clock.part("towers, forward"), autocast(device, precision):
                        out = model(image_BCHW, genes, masked_BG)
                    added = added_loss(out, config.loss, chunk.weight_B / max(n_weighed, 1.0))
                    return Embedded(out.z_image_BD, out.z_gene_BD, added)

                with clock.part("loss and backward"):
                    passed = backward_in_chunks(
                        len(chunks),
                        embed,
                        lambda z_image_BD, z_gene_BD: model.pair_loss(
                            z_image_BD, z_gene_BD, weight_B, sample_B, world
                        ),
                        scaler.scale,
                    )
                with clock.part("gradients of all ranks"):
                    world.sum_gradients(model.parameters())
                    losses = torch.stack([passed.loss, passed.loss + passed.added])
                    pair_loss, loss = world.total(losses).tolist()
                with clock.part("optimiser"):
                    scaler.unscale_(optimizer)
                    grad_norm = torch.nn.utils.clip_grad_norm_(
                        model.parameters(), optim.grad_clip or math.inf
                    ).item()
                    # Gradients that overflow in float16 are its scaler's, which skips their step.
                    if not math.isfinite(loss if scaler.is_enabled() else loss * grad_norm):
                        found_in = f"loss {loss}, gradient norm {grad_norm}"
                        raise not_finite(
                            config.run.out, world.rank, step, stream, index_B, passed, found_in
                        )
                    lr = learning_rate(step, optim)
                    for group in optimizer.param_groups:
                        group["lr"] = lr * group["lr_scale"]
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad(set_to_none=True)
                    if ema is not None:
                        ema.update_parameters(model)
                if step == first_step:
                    clock.restart()
                step, cursor, n_bad = step + 1, cursor + n_global, n_bad + int(n_faults)

                # What is told, kept and checked.
                last, row = step == n_steps, dict[str, float]()
                every = config.run.validate_every
                if validation is not None and every is not None and (last or step % every == 0):
                    used: Any = model if ema is None else ema.module
                    row |= validated(used, validation, config, device)
                if metrics is not None:
                    metrics.count(n_global, batch.waited_s)
                    if last or row or step % config.run.log_every == 0:
                        row = {
                            "step": step,
                            "samples": cursor,
                            "epoch": cursor / order.n,
                            "loss": loss,
                            "pair_loss": pair_loss,
                            "lr": lr,
                            "temperature": model.pair_loss.temperature.item(),
                            "grad_norm": grad_norm,
                            "bad_samples": n_bad,
                            **in_batch_r1(passed.z_image_BD, passed.z_gene_BD, weight_B),
                            **runs_in_batch(stream, order.batch(batch.positions)),
                            **row,
                        }
                        metrics.tell(row, device)
                val_r5 = row.get("val_r5")
                better = val_r5 is not None and val_r5 > best_val_r5
                if last or stopped or better or step % config.run.checkpoint_every == 0:
                    save(val_r5)
                    saved_step, best_val_r5 = step, max(best_val_r5, val_r5 or 0.0)
        except (BadInput, RuntimeError):
            # Of data, of numbers or of another rank; what this one has is that of the last step.
            for kept, now in zip(before, statistics, strict=True):
                now.copy_(kept)
            if step > saved_step:
                save()
            raise
        if profile_steps is not None:
            clock.tell(step - first_step - 1)
    return step >= n_steps


def in_steps(optim: OptimConfig, steps_per_epoch: int) -> tuple[OptimConfig, int]:
    """The config with its lengths in steps, and how many it runs."""
    n_steps = optim.steps
    if n_steps is None:
        assert optim.epochs is not None
        n_steps = max(1, round(optim.epochs * steps_per_epoch))
    warmup_steps = optim.warmup_steps
    if warmup_steps is None:
        assert optim.warmup_epochs is not None
        warmup_steps = round(optim.warmup_epochs * steps_per_epoch)
    if warmup_steps >= n_steps:
        raise BadInput(
            "optim",
            expected="a warm-up shorter than the run",
            found=f"{warmup_steps} steps of {n_steps}, at {steps_per_epoch} steps an epoch",
            remedy="give optim.warmup_steps or optim.epochs that fit the data",
        )
    lengths = {
        "steps": n_steps, "epochs": None, "warmup_steps": warmup_steps, "warmup_epochs": None,
    }  # fmt: skip
    return optim.model_copy(update=lengths), n_steps


def learning_rate(step: int, optim: OptimConfig) -> float:
    """Of the update that `step` (from 0) makes: linear warm-up, then half a cosine to `lr_min`."""
    assert optim.steps is not None
    assert optim.warmup_steps is not None
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    done = (step - optim.warmup_steps) / (optim.steps - optim.warmup_steps)
    return optim.lr_min + (optim.lr - optim.lr_min) * (1 + math.cos(math.pi * done)) / 2


def added_loss(out: PairEmbedded, loss: LossConfig, share_B: torch.Tensor) -> torch.Tensor | None:
    """What the config adds for each row, times the row's share of the batch; None for nothing."""
    terms = [
        weight * (per_row_B @ share_B)
        for weight, per_row_B in (
            (loss.image_expression, out.image_expression_B),
            (loss.masked_genes, out.masked_genes_B),
        )
        if per_row_B is not None
    ]
    return torch.stack(terms).sum() if terms else None


def _fit(
    model: PairModel, places: GenePlaces, read: Callable[[Indices], Batch], indices: Indices
) -> None:
    counts_SG, measured_SG = [], []
    for some in np.array_split(indices, -(-len(indices) // 256)):
        batch = read(some).to(torch.device("cpu"))
        genes = gene_input(batch, places, 0)
        sound_B = batch.weight_B > 0
        counts_SG.append(genes.counts_BG[sound_B])
        measured_SG.append(genes.measured_BG[sound_B])
    model.fit(torch.cat(counts_SG), torch.cat(measured_SG))


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
    return Loader(stream, vocabulary, neighbors_k=config.model.neighbors_k)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 done; 1 a step or a checkpoint failed; 2 bad input; 3 stopped by a signal after saving."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.toml")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    how.add_argument(
        "--init-from", type=Path, metavar="CHECKPOINT", help="start anew with its weights alone"
    )
    parser.add_argument(
        "--profile",
        type=int,
        nargs="?",
        const=20,
        metavar="STEPS",
        help="end after so many (20), tell where time went",
    )
    parser.add_argument(
        "--with-parent", action="store_true", help="stop once the process that started this is gone"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parent = os.getppid() if options.with_parent else None
    caught: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda n, _: caught.append(n))
    try:
        done = train(
            read_config(options.config),
            resume=options.resume,
            init_from=options.init_from,
            profile_steps=options.profile,
            stop=lambda: bool(caught) or parent not in (None, os.getppid()),
        )
    except (BadInput, BadInputs) as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        fault = BadInput(
            error.filename or "the folder of the run",
            expected="a file that can be read and written",
            found=error.strerror or str(error),
            remedy="mend that, then go on with --resume: what was saved before is whole",
        )
        print(fault, file=sys.stderr)
        return 1
    if not done and options.profile is None:
        print("stopped by a signal; go on with --resume", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
