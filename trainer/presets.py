"""What a preset fills in: everything but `data` and `run.out`, which are the user's alone.

TOML has no null: what a preset leaves out by null stays out unless a value is given.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Final

Preset = dict[str, dict[str, Any]]


def _changed(preset: Preset, changes: Preset) -> Preset:
    changed = deepcopy(preset)
    for section, values in changes.items():
        changed[section] |= values
    return changed


_SMALL: Final[Preset] = {
    "model": {
        "image": "test_resnet",
        "image_options": {},
        "image_weights": None,
        "image_px": 64,
        "fov_um": 20.0,
        "genes": "mlp",
        "gene_hidden": [256, 256],
        "rank": None,
        "graph": None,
        "projection": "linear",
        "dropout": 0.2,
        "embed_dim": 128,
    },
    "loss": {
        "kind": "info_nce",
        "temperature": 0.07,
        "temperature_min": 0.01,
        "temperature_max": 1.0,
        "siglip_bias": -10.0,
        "image_expression": 0.0,
        "masked_genes": 0.0,
        "masked_share": 0.0,
        "expression_family": "negative_binomial",
    },
    "optim": {
        "steps": 600,
        "epochs": None,
        "warmup_steps": 50,
        "warmup_epochs": None,
        "lr": 3e-3,
        "lr_min": 0.0,
        "image_lr_scale": 1.0,
        "betas": [0.9, 0.98],
        "weight_decay": 0.05,
        "grad_clip": 1.0,
        "ema": None,
        "precision": "auto",
    },
    "data_loading": {
        "batch_size": 128,
        "micro_batch": None,
        "workers": 1,
        "loader": "ring",
        "reading": "global",
        "block": {"pieces": 512, "piece_samples": 256},
        "cache_bytes": 4 << 30,
        "balanced": False,
        "cap": {},
        "weight": {},
        "verify": "crc32",
        "max_bad_samples": 0,
        "shift_um": 1.5,
        "zoom": 1.1,
        "turns": True,
        "rotate_deg": 0.0,
        "blur_px": 0.0,
        "stain_gain": 0.15,
        "stain_mix": 0.05,
        "stain_offset": 0.03,
        "keep_counts": 0.5,
    },
    "run": {
        "seed": 0,
        "device": "auto",
        "compile": False,
        "checkpoint_activations": False,
        "log_every": 10,
        "checkpoint_every": 100,
        "keep_checkpoints": 2,
        "validate_every": None,
    },
}

# Every number of PAST's released code (arXiv 2507.06418); what is not its own: docs/past.md.
_PAST: Final[Preset] = _changed(
    _SMALL,
    {
        "model": {
            "image": "vit_large_patch16_224",
            "image_options": {
                "init_values": 1e-5,
                "pretrained_cfg_overlay": {
                    "mean": [0.485, 0.456, 0.406],
                    "std": [0.229, 0.224, 0.225],
                },
            },
            "image_px": 224,
            "fov_um": "patch",
            "genes": "rank",
            "rank": {
                "width": 512,
                "depth": 12,
                "heads": 16,
                "feedforward": 1024,
                "context": 300,
                "dropout": 0.0,
                "means": None,
            },
            "graph": {"neighbors": 8, "hidden": 256, "layers": 2, "heads": 4, "bias": -1.0},
            "projection": "residual",
            "dropout": 0.1,
            "embed_dim": 256,
        },
        "loss": {"kind": "soft_targets"},
        "optim": {
            "steps": None,
            "epochs": 20.0,
            "warmup_steps": None,
            "warmup_epochs": 1.0,
            "lr": 5e-4,
            "lr_min": 1e-6,
            "image_lr_scale": 0.1,
            "betas": [0.9, 0.95],
            "weight_decay": 2e-2,
            "grad_clip": None,
        },
        "data_loading": {
            "batch_size": 1920,
            "micro_batch": 48,
            "workers": 2,
            "shift_um": 0.0,
            "zoom": 1.0,
            "turns": False,
            "stain_gain": 0.0,
            "stain_mix": 0.0,
            "stain_offset": 0.0,
            "keep_counts": 1.0,
        },
        "run": {"checkpoint_every": 10_000},
    },
)

# What did best on small towers (docs/training.md), on towers for one GPU.
_DEFAULT: Final[Preset] = _changed(
    _SMALL,
    {
        "model": {
            "image": "vit_small_patch16_224",
            "image_px": 224,
            "fov_um": "patch",
            "gene_hidden": [1024, 512],
            "embed_dim": 256,
        },
        "loss": {"image_expression": 0.1},
        "optim": {
            "steps": None,
            "epochs": 10.0,
            "warmup_steps": None,
            "warmup_epochs": 0.5,
            "lr": 1e-3,
            "lr_min": 1e-6,
            "ema": 0.999,
        },
        "data_loading": {"batch_size": 1024, "micro_batch": 256, "workers": 2},
        "run": {"log_every": 20, "checkpoint_every": 1000},
    },
)

PRESETS: Final[dict[str, Preset]] = {"small": _SMALL, "past": _PAST, "default": _DEFAULT}
