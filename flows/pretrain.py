"""Training as a Prefect flow: the trainer is a process of its own, heard through the run's log."""

from __future__ import annotations

from collections import deque

from prefect import flow, get_run_logger

from flows.deployed import absolute_config
from flows.training import train

_LINES_OF_REASON = 20


class TrainingFailed(Exception):
    """The trainer ended with another exit code than 0; the message ends with its last lines."""


@flow(name="pretrain")
def pretrain(config: str) -> None:
    """Train the config at this absolute path, going on from its newest checkpoint if it has one.

    A training that is complete on an unchanged dataset is left as it is, so that a curation
    that reused everything costs nothing here. On another dataset the trainer refuses to go on.
    """
    path = absolute_config(config)
    log = get_run_logger()
    last_lines: deque[str] = deque(maxlen=_LINES_OF_REASON)

    def tell(line: str) -> None:
        log.info("%s", line)
        last_lines.append(line)

    code = train(path, "--resume", tell=tell)
    if code:
        raise TrainingFailed("\n".join([f"trainer.train ended with exit code {code}", *last_lines]))
