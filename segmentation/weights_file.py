"""Files of weights, read without running what they may carry: tensors by name, or a refusal."""

from __future__ import annotations

import struct
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final

import safetensors.torch
import torch
from safetensors import SafetensorError

from shards.errors import BadInput

# safetensors itself takes no longer header than this.
_LONGEST_HEADER_BYTES: Final = 100_000_000
# What torch's reader was seen to raise on zip files and pickles with bytes changed or cut off.
_OF_DAMAGE: Final = (
    AssertionError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError,
    struct.error,
)  # fmt: skip


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file that torch saved, in its zip or its older format, or of safetensors.

    Tensors come on the CPU, in the types in which they lie in the file. Nothing but tensors is ever
    built from a pickle. Raises BadInput, naming the cause, where the file holds anything else.
    """
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise _refusal(path, "an empty file", _AGAIN)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _LONGEST_HEADER_BYTES:
        return _read_safetensors(path)
    if not any(byte < 32 and byte not in b"\t\n\f\r" for byte in start):
        found = "text, as a web page or a pointer to a large file is"
        raise _refusal(path, found, "download the weights themselves")
    if start[:1] == b"\x80" and start[:2] != b"\x80\x02":  # torch writes no other protocol
        raise _refusal(path, _PICKLE, _ALONE)
    state = _load(path)
    if not isinstance(state, dict):
        raise _refusal(path, f"a {type(state).__name__}, not a state dict", _ALONE)
    others = [key for key, value in state.items() if not torch.is_tensor(value)]
    if others:
        found = f"a dict with other things than tensors, such as {str(others[0])!r}"
        raise _refusal(path, found, _ALONE)
    return {str(key): value for key, value in state.items()}


_PICKLE: Final = "more than tensors: it needs a pickle, which can run any code: refused"
_AGAIN: Final = "copy or download it again, whole"
_ALONE: Final = "save the network's state_dict() alone, where the weights come from"


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        # Of what is no pickle at all, torch names the byte at which it stopped.
        if "Unsupported operand" in str(error):
            raise _refusal(path, "bytes that are no weights", _AGAIN) from error
        raise _refusal(path, _PICKLE, _ALONE) from error
    except _OF_DAMAGE as error:
        words = str(error).split("\n")[0] or type(error).__name__
        raise _refusal(path, f"a file that is damaged or cut off ({words})", _AGAIN) from error


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    # Read whole, not mapped: the file may be written anew while its tensors are used.
    try:
        return safetensors.torch.load(path.read_bytes())
    except (SafetensorError, *_OF_DAMAGE) as error:
        found = f"a safetensors file that is damaged or cut off ({error})"
        raise _refusal(path, found, _AGAIN) from error


def _refusal(path: Path, found: str, remedy: str) -> BadInput:
    return BadInput(
        path,
        expected="Cellpose 4 weights, a state dict of tensors, or compact ones",
        found=found,
        remedy=remedy,
    )
