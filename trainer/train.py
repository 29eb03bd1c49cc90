"""Contrastive pretraining on patches and counts: one loop, read from top to bottom.

    python -m trainer.train CONFIG.toml [--resume | --init-from CHECKPOINT] [--profile STEPS]
    torchrun --nproc-per-node 8 -m trainer.train CONFIG.toml --resume

Everything random in a step follows from the seed and the number of the step, and the data from
the cursor, so a checkpoint is parameters, optimiser and two integers, and a resumed run goes on
exactly.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from shards.errors import BadInput, BadInputs
from shards.lock import hold
from shards.mix import Mix
from shards.order import share_of
from shards.stream import read_stream
from trainer.augment import augmented, draws, masked_genes, step_generator, thinned
from trainer.caching import Embedded, backward_in_chunks
from trainer.checkpoint import (
    CheckpointWriter,
    TrainState,
    best_checkpoint,
    check_resumable,
    checkpoints,
    read_meta,
    read_part,
)
from trainer.config import OptimConfig, TrainConfig, read_config
from trainer.data import Loader
from trainer.distributed import start_world
from trainer.embed import autocast, chosen_device, chosen_precision, gene_input, validated
from trainer.faults import not_finite, too_many, write_down
from trainer.inherit import inherit, inherited_vocabulary
from trainer.metrics import Clock, Metrics, in_batch_r1, runs_in_batch
from trainer.model import PairModel
from trainer.vocabulary import Vocabulary

VALIDATION_BATCH = 64
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
        device = world.device
        if world.rank == 0:
            stack.enter_context(hold(config.run.out / ".lock", f"training in {config.run.out}"))
        world.any(False)  # nobody goes on before the folder is ours

        # --- data
        loading = config.data_loading
        mix = Mix(cap=loading.cap, weight=loading.weight)
        stream = read_stream(config.data, "train", mix, verify=loading.verify)
        known = inherited_vocabulary(init_from) if init_from else ()
        vocabulary = Vocabulary.union(stream.panels, known)
        loader = Loader(stream, vocabulary, neighbors_k=config.model.neighbors_k)
        order = stream.order(
            config.run.seed,
            reading=loading.reading,
            balanced=loading.balanced,
            pieces=loading.block.pieces,
            piece_samples=loading.block.piece_samples,
        )
        validation = _validation_loader(config, vocabulary)
        fov_um = loader.shown_um(config.model.fov_um)
        # A model goes on to see what it was trained on, whatever patches it meets later; and a
        # length in epochs is one in steps from here on.
        optim = in_steps(config.optim, -(-len(stream) // loading.batch_size))
        shown = config.model.model_copy(update={"fov_um": fov_um})
        config = config.model_copy(update={"model": shown, "optim": optim})

        # --- model
        torch.manual_seed(config.run.seed)
        model = PairModel(vocabulary, config.model, config.loss)
        optimizer = torch.optim.AdamW(model.parameter_groups(optim), lr=optim.lr, betas=optim.betas)
        precision = chosen_precision(optim.precision, device)
        scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)

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
        step, cursor, n_bad = 0, 0, 0
        if found:
            meta = read_meta(found[-1])
            check_resumable(found[-1], meta, config, stream.fingerprint)
            step, cursor, n_bad = meta.step, meta.cursor, meta.n_bad_samples
            model.load_state_dict(read_part(found[-1], "model"))
        else:
            if config.model.image_weights is not None:
                model.image.load(config.model.image_weights)
            model.fit(*loader.sample(order.batch(range(min(_FIT_ON, len(stream))))))
            if init_from is not None:
                inherit(model, init_from)
        model.to(device)
        world.broadcast(model)
        ema = None
        if optim.ema is not None:
            ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(optim.ema))
        kept = {"model": model, "optimizer": optimizer, "scaler": scaler}
        kept |= {"ema": ema} if ema is not None else {}
        if found:
            for name in kept.keys() - {"model"}:
                kept[name].load_state_dict(read_part(found[-1], name))
        if config.run.checkpoint_activations:
            model.image.checkpoint_activations()
        if config.run.compile:
            model.image.compile()
            model.gene.compile()
        if world.rank == 0:
            config.run.out.mkdir(parents=True, exist_ok=True)
            (config.run.out / "config.json").write_text(config.model_dump_json(indent=1))
            print(
                f"{len(stream)} pairs of {len(stream.runs)} runs, {len(vocabulary.genes)} genes, "
                f"{world.size} x {device}; steps {step} to {optim.steps}",
                flush=True,
            )
        last_step = optim.n_steps if profile_steps is None else step + profile_steps
        if step >= last_step:
            return True

        # --- the loop
        clock = Clock(profile_steps is not None, device)
        metrics = Metrics(config.run.out, step) if world.rank == 0 else None
        writer = stack.enter_context(CheckpointWriter(folder, config.run.keep_checkpoints))
        batches = loader.training(order, cursor, loading, world.rank, world.size)
        stack.callback(batches.close)
        model.train()
        saved_step, best_val_r5, stopped = step, _best_val_r5(folder), False
        try:
            while step < last_step and not stopped:
                batch = next(batches)
                clock.add("waiting for data", batch.waited_s)
                with clock.part("copying to the device"):
                    chunks = [chunk.to(device) for chunk in batch.chunks]
                weight_B = torch.cat([chunk.weight_B for chunk in chunks])
                faults = [fault for chunk in chunks for fault in chunk.faults]
                write_down(config.run.out, world.rank, step, stream, faults)
                # One exchange: all ranks stop, and refuse, at the same step.
                told = torch.tensor(
                    [weight_B.sum().item(), len(faults), stop()], dtype=torch.float64, device=device
                )
                n_weighed, n_faults, n_stopping = world.total(told).tolist()
                n_bad, stopped = n_bad + int(n_faults), n_stopping > 0
                if n_bad > loading.max_bad_samples:
                    raise too_many(config.run.out, n_bad, loading.max_bad_samples, faults)

                # What is random is drawn on the CPU, from the seed and the step, for all ranks.
                drawn = draws(len(batch.positions), loading, config.run.seed, step)
                own = share_of(range(len(batch.positions)), world.rank, world.size)
                drawn = drawn.rows(own.start, len(weight_B))
                starts = [0, *torch.tensor([len(c.weight_B) for c in chunks]).cumsum(0).tolist()]

                def embed(i: int) -> Embedded:
                    chunk, generator = chunks[i], step_generator(config.run.seed, step, own.start, i)
                    torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))  # dropout
                    with clock.part("augmentation"):
                        image_BCHW = augmented(
                            chunk.image_BHWC,
                            drawn.rows(starts[i], starts[i + 1]),
                            patch_um=loader.fov_um,
                            fov_um=fov_um,
                            size_px=config.model.image_px,
                            stained=loader.image == "he",
                        )
                        chunk = thinned(chunk, loading.keep_counts, generator)
                        genes = gene_input(chunk, loader, device)
                        masked_BG = masked_genes(
                            genes.measured_BG, config.loss.masked_share, generator
                        )
                    with clock.part("towers, forward"), autocast(device, precision):
                        out = model(image_BCHW, genes, masked_BG)
                    added = model.added_loss(out, chunk.weight_B) / n_weighed
                    return Embedded(out.z_image_BD, out.z_gene_BD, added)

                with clock.part("loss and backward"):
                    sample_B = stream.sample_of(...)
                    done = backward_in_chunks(
                        len(chunks),
                        embed,
                        lambda z_image_BD, z_gene_BD: model.pair_loss(
                            z_image_BD, z_gene_BD, weight_B, sample_B, world
                        ),
                        scaler.scale,
                    )
                with clock.part("gradients of all ranks"):
                    world.sum_gradients(model.parameters())
                with clock.part("optimiser"):
                    scaler.unscale_(optimizer)
                    grad_norm = torch.nn.utils.clip_grad_norm_(
                        model.parameters(), optim.grad_clip or math.inf
                    ).item()
                    pair_loss, loss = world.total(torch.stack([done.pair_loss, done.loss])).tolist()
                    # Half precision overflows now and then: its scaler skips such a step.
                    if not math.isfinite(loss) or not (math.isfinite(grad_norm) or scaler.is_enabled()):
                        raise not_finite(...)
                    lr = learning_rate(step, optim)
                    for group in optimizer.param_groups:
                        group["lr"] = lr * group["lr_scale"]
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad(set_to_none=True)
                    if ema is not None:
                        ema.update_parameters(model)
                step, cursor = step + 1, cursor + len(batch.positions)
