"""What presets and terms learn on a held-out donor, beside a ridge, chance and shuffled pairs.

    python -m benchmarks.learning DATASET --out DIR [--variants NAME ...]

DATASET is a curation with train, val and test donors; `--simulate` makes one of eight donors and
11,200 cells first (see docs/training.md). Each variant trains in a process of its own and leaves
DIR/VARIANT; one that is there already is only told. Curves go to DIR/curves.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import matplotlib.pyplot as plt

from benchmarks.registration.limits import Limits

N_DONORS, CELLS_PER_DONOR = 8, 1400
_LAYOUTS: Final = ("xoa-2.0", "xoa-3.0", "xoa-4.0", "xoa-1.3")
# How far shuffled pairs may lie from chance: four standard errors of a share of so many queries.
_SIGMAS: Final = 4.0

Sections = dict[str, dict[str, Any]]
# PAST's losses, graph, ranks and optimiser on towers that a CPU trains.
_SMALL_TOWERS: Final[Sections] = {
    "model": {
        "image": "test_resnet",
        "image_options": {},
        "image_px": 64,
        "fov_um": 20.0,
        "rank": {"width": 64, "depth": 2, "heads": 4, "feedforward": 128, "context": 100},
        "graph": {"hidden": 64},
        "embed_dim": 64,
    },
    # Not from pretrained weights, of which a tenth of the rate is enough.
    "optim": {"steps": 900, "warmup_steps": 60, "image_lr_scale": 1.0},
    "data_loading": {"batch_size": 128, "micro_batch": "none", "workers": 1},
}
VARIANTS: Final[dict[str, tuple[str, Sections]]] = {
    "small": ("small", {}),
    "small, 1200 steps": ("small", {"optim": {"steps": 1200}}),
    "past": ("past", _SMALL_TOWERS),
    "balanced": ("small", {"data_loading": {"balanced": True}}),
    "siglip": ("small", {"loss": {"kind": "siglip"}}),
    "soft targets": ("small", {"loss": {"kind": "soft_targets"}}),
    "image to expression": ("small", {"loss": {"image_expression": 0.1}}),
    "masked genes": ("small", {"loss": {"masked_genes": 0.1, "masked_share": 0.15}}),
    "averaged": ("small", {"optim": {"ema": 0.99}}),
    "ranks": (
        "small",
        {
            "model": {
                "genes": "rank",
                "rank": {
                    "width": 128,
                    "depth": 2,
                    "heads": 4,
                    "feedforward": 256,
                    "context": 100,
                    "dropout": 0.0,
                    "means": "none",
                },
            }
        },
    ),
    "neighbours": (
        "small",
        {"model": {"graph": {"neighbors": 8, "hidden": 64, "layers": 2, "heads": 4, "bias": 0.0}}},
    ),
}


def main() -> int:
    """0 if every limit is met, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--variants", nargs="+", default=["small", "past"])
    options = parser.parse_args()
    if unknown := set(options.variants) - VARIANTS.keys():
        parser.error(f"no variant {min(unknown)!r}: there are {', '.join(VARIANTS)}")
    if options.simulate and not (options.dataset / "dataset.json").exists():
        simulate(options.dataset)
    limits = Limits()
    for name in options.variants:
        run = options.out / name.replace(", ", "-").replace(" ", "-")
        tell(limits, name, trained(run, options.dataset.resolve(), *VARIANTS[name]))
    draw(options.out)
    return 0 if limits.met else 1


def simulate(dataset: Path) -> None:
    """Eight donors of all layouts in one curation: six to train on, one for val, one for test."""
    folder = dataset.parent
    folder.mkdir(parents=True, exist_ok=True)
    assign = {f"D{i}": "train" for i in range(1, N_DONORS + 1)}
    assign |= {f"D{N_DONORS - 1}": "val", f"D{N_DONORS}": "test"}
    lines = ['name = "learning"', f'out = "{dataset.name}"', "[split.assign]"]
    lines += [f'{donor} = "{split}"' for donor, split in assign.items()]
    for i in range(1, N_DONORS + 1):
        words = ["--cells", str(CELLS_PER_DONOR), "--seed", str(100 + i), "--warp-um", "15"]
        cellpair("simulate", f"d{i}", *words, "--layout", _LAYOUTS[(i - 1) % 4], cwd=folder)
        lines += [
            "[[runs]]",
            f'id = "run-{i}"',
            f'xenium = "d{i}/outs"',
            f'slide = "d{i}/he.ome.tif"',
            f'alignment = "d{i}/he_imagealignment.csv"',
            f'donor = "D{i}"',
            'species = "human"',
        ]
    (folder / "curate.toml").write_text("\n".join(lines))
    cellpair("curate", "curate.toml", cwd=folder)


def cellpair(*words: str, cwd: Path) -> None:
    subprocess.run([Path(sys.executable).with_name("cellpair"), *words], cwd=cwd, check=True)


def trained(run: Path, dataset: Path, preset: str, sections: Sections) -> dict[str, Any]:
    """`evaluation.json` of the variant, trained and evaluated if it is not there."""
    found = run / "evaluation" / "evaluation.json"
    if not found.exists():
        run.mkdir(parents=True, exist_ok=True)
        config = run / "train.toml"
        out = {"run": {"out": str(run / "model"), "validate_every": 100, "device": "cpu"}}
        config.write_text(toml(dataset, preset, out | sections))
        module("train", config, "--resume")
        newest = max((run / "model" / "checkpoints").glob("step-*"))
        module("evaluate", newest, dataset, "--out", found.parent)
    evaluation: dict[str, Any] = json.loads(found.read_text())
    return evaluation


def module(name: str, *words: str | Path) -> None:
    subprocess.run([sys.executable, "-m", f"trainer.{name}", *map(str, words)], check=True)


def toml(dataset: Path, preset: str, sections: Sections) -> str:
    """A train config."""
    lines = [f'preset = "{preset}"', f'data = "{dataset}"']
    for name, values in sections.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {_inline(value)}" for key, value in values.items()]
    return "\n".join(lines)


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_inline(v)}" for k, v in value.items()) + " }"
    return json.dumps(value)


def tell(limits: Limits, name: str, evaluation: dict[str, Any]) -> None:
    """R@5 among 64 both ways, against the ridge, and shuffled pairs against chance."""
    limits.head(f"{name}: {evaluation['n_samples']} pairs of a held-out donor")
    lines = {
        (line["method"], line["direction"]): line
        for line in evaluation["retrieval"]
        if line["scope"] == "batch"
    }
    for direction in ("image_to_genes", "genes_to_image"):
        chance = lines["chance", direction]["r_at_5"]
        model = lines["model", direction]["r_at_5"]
        least = chance if name == "past" else lines["ridge", direction]["r_at_5"]
        limits.line(f"R@5 {direction}, beside {'chance' if name == 'past' else 'the ridge'}",
                    model, "≥", round(least, 3))  # fmt: skip
        shuffled = lines["shuffled_pairs", direction]
        error = math.sqrt(chance * (1 - chance) / shuffled["n_queries"])
        off = abs(shuffled["r_at_5"] - chance)
        limits.line("shuffled pairs off chance", off, "≤", round(_SIGMAS * error, 3))


def draw(out: Path) -> None:
    """Loss and validation of every variant that there is."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    for path in sorted(out.glob("*/model/metrics.csv")):
        with path.open(newline="") as f:
            rows = list(csv.DictReader(f))
        name = path.parent.parent.name
        told = [(int(r["step"]), float(r["pair_loss"])) for r in rows]
        left.plot(*zip(*told, strict=True), label=name, linewidth=1)
        scored = [(int(r["step"]), float(r["val_r5"])) for r in rows if r["val_r5"]]
        if scored:
            right.plot(*zip(*scored, strict=True), label=name, linewidth=1)
    left.set(xlabel="step", ylabel="loss of pairs")
    right.set(xlabel="step", ylabel="validation R@5 among 64")
    right.axhline(5 / 64, color="grey", linewidth=0.8, linestyle=":")
    right.legend(fontsize=7)
    figure.savefig(out / "curves.png", dpi=110)


if __name__ == "__main__":
    sys.exit(main())
