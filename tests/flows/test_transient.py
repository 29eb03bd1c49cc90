"""Which errors are worth another try."""

from __future__ import annotations

import errno
import logging
import os

import dask
import pytest
from distributed import Client, KilledWorker, LocalCluster
from distributed.client import FutureCancelledError
from distributed.comm import CommClosedError
from distributed.core import RPCClosed

from flows.transient import is_transient
from shards.errors import BadInput, BadInputs

_BAD = BadInput("he.ome.tif", expected="a slide", found="none", remedy="give one")


def _caused(error: Exception, by: BaseException) -> Exception:
    error.__cause__ = by
    return error


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("gone"),
        ConnectionResetError(),
        BrokenPipeError(),
        TimeoutError("late"),
        CommClosedError("in <TCP>: Stream is closed"),
        RPCClosed("RPC Closed"),
        FutureCancelledError("block-1", "scheduler-connection-lost"),
        *(
            OSError(getattr(errno, name), "as the system says", "slide.tif")
            for name in (
                *("EIO", "ESTALE", "EAGAIN", "ETIMEDOUT", "ENETUNREACH", "EHOSTUNREACH"),
                *("ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "ENOTCONN", "EHOSTDOWN"),
            )
        ),
    ],
    ids=repr,
)
def test_lost_connections_and_tired_file_systems_are_transient(error: Exception) -> None:
    assert is_transient(error)
    assert is_transient(_caused(ValueError("a table that ends early"), error))
    assert is_transient(_caused(RuntimeError("1"), _caused(ValueError("2"), error)))


@pytest.mark.parametrize(
    "error",
    [
        _BAD,
        BadInputs([_BAD]),
        ValueError("nan"),
        MemoryError(),
        KeyError("cell_id"),
        OSError("without a number"),
        FileNotFoundError(errno.ENOENT, "No such file or directory"),
        KeyboardInterrupt(),
        SystemExit(3),
        *(
            OSError(getattr(errno, name), "as the system says")
            for name in ("ENOSPC", "EDQUOT", "EACCES", "EPERM", "EROFS", "EEXIST", "EMFILE")
        ),
    ],
    ids=repr,
)
def test_what_stays_as_it_is_until_somebody_acts_is_not(error: BaseException) -> None:
    assert not is_transient(error)
    assert not is_transient(_caused(RuntimeError("in a stage"), error))


def test_what_was_merely_being_handled_is_no_cause() -> None:
    error = ValueError("another fault")
    error.__context__ = TimeoutError()
    assert not is_transient(error)


def test_a_chain_that_bites_its_tail_ends() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert not is_transient(first)


def test_a_block_that_kills_its_workers_is_transient() -> None:
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster) as client,
        pytest.raises(KilledWorker) as killed,
    ):
        client.submit(os._exit, 9).result()
    assert is_transient(killed.value)
