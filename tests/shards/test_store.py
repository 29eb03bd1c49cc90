"""Artifacts behind a URL: whole or absent, whatever happens on the way there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from shards.artifact import RECORD_FILE, ArtifactRecord, Identity
from shards.cache import Cache, Holding
from shards.errors import BadInput, BadSetting
from shards.remote import RemotePath, remote_path
from shards.store import RemoteStore
from tests.s3 import Line

IDENTITY = Identity(stage="s", stage_version=1, config={}, parents={}, inputs={})
FILES = {f"part-{i}.bin": bytes([i]) * 1000 for i in range(12)} | {"facts.json": b"{}"}
Opened = Callable[..., RemoteStore]


@pytest.fixture
def store(bucket: str, s3: Line, tmp_path: Path) -> Opened:
    """Opens the store of this test, on as many machines as are named."""

    def opened(machine: str = "a", limit_bytes: int = 10**6) -> RemoteStore:
        folder = tmp_path / machine
        (folder / "work").mkdir(parents=True, exist_ok=True)
        cache = Cache(folder, limit_bytes)
        return RemoteStore(folder / "work", remote_path(bucket), cache)

    return opened


def make(out: Path, kept: Path) -> dict[str, Any]:
    for name, data in FILES.items():
        (out / name).write_bytes(data)
    return {"n": len(FILES)}


def never(out: Path, kept: Path) -> dict[str, Any]:
    raise AssertionError("made again")


def build(store: RemoteStore, make: Any = make) -> tuple[Path, ArtifactRecord, bool]:
    with closing(Holding()) as held:
        return store.build(
            store.root / "runs" / "r" / "s",
            IDENTITY,
            make,
            provenance={},
            check_inputs=lambda: None,
            held=held,
        )


@pytest.fixture
def held() -> Iterator[Holding]:
    with closing(Holding()) as held:
        yield held


def artifact(store: RemoteStore) -> RemotePath:
    return store.remote / "runs/r/s" / IDENTITY.fingerprint


def test_an_artifact_made_on_one_machine_is_reused_on_another(store: Opened, held: Holding) -> None:
    here, there = store("a"), store("b")
    folder, record, reused = build(here)
    assert not reused
    assert {p.name: p.read_bytes() for p in folder.iterdir()}.items() >= FILES.items()
    found, same, reused = build(there, never)
    assert reused
    assert same == record
    assert not found.exists()
    there.at_hand(found, held, texts=True)
    assert sorted(p.name for p in found.iterdir()) == [RECORD_FILE, "facts.json"]
    there.at_hand(found, held)
    assert {p.name: p.read_bytes() for p in found.iterdir()}.items() >= FILES.items()


def test_a_record_is_put_last_and_alone_makes_an_artifact(store: Opened, s3: Line) -> None:
    here = store()
    build(here)
    put = [path.rpartition("/")[2] for method, path in s3.requests if method == "PUT"]
    assert put[0].endswith(".claim")
    assert put[-1] == RECORD_FILE
    assert sorted(put[1:-1]) == sorted(FILES)


def test_an_upload_that_the_network_cuts_leaves_nothing_and_goes_on(
    store: Opened, s3: Line
) -> None:
    here = store()
    s3.cut_at = lambda method, path: method == "PUT" and path.endswith("part-11.bin")
    with pytest.raises(ConnectionError, match="run the same command again"):
        build(here)
    s3.mend()
    assert here.find(here.root / "runs/r/s" / IDENTITY.fingerprint) is None
    assert not (artifact(here) / RECORD_FILE).is_file()
    s3.clear()
    _, record, reused = build(here, never)  # it was made, and only has to be put
    assert reused
    assert here.find(here.root / "runs/r/s" / IDENTITY.fingerprint) == record
    again = {path.rpartition("/")[2] for method, path in s3.requests if method == "PUT"}
    assert "part-11.bin" in again
    assert not again >= set(FILES)
    assert {n: (artifact(here) / n).read_bytes() for n in FILES} == FILES


@pytest.mark.parametrize("damage", [b"short", b""])
def test_a_truncated_object_has_its_artifact_made_again(
    store: Opened, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    build(store("a"))
    (artifact(store("a")) / "part-1.bin").write_bytes(damage)
    here = store("b")
    _, _, reused = build(here)
    assert not reused
    assert f"part-1.bin: {len(damage)} bytes, not 1000 bytes; made again" in caplog.text
    assert (artifact(here) / "part-1.bin").read_bytes() == FILES["part-1.bin"]


def test_a_swapped_object_is_told_when_it_is_fetched(store: Opened, held: Holding) -> None:
    build(store("a"))
    here = store("b")
    (artifact(here) / "part-1.bin").write_bytes(FILES["part-2.bin"])
    folder, *_ = build(here, never)
    with pytest.raises(BadInput, match=r"part-1\.bin") as error:
        here.at_hand(folder, held)
    assert "sha256" in error.value.found
    assert not (folder / "part-1.bin").exists()


def test_copies_that_nobody_holds_go_when_room_is_needed(store: Opened, held: Holding) -> None:
    build(store("a"))
    n_bytes = sum(map(len, FILES.values()))
    here = store("b", limit_bytes=n_bytes + 10)
    folder, *_ = build(here, never)
    here.at_hand(folder, held)
    cache = Cache(here.root.parent, n_bytes + 10)
    with closing(cache.entry("other")) as other:
        with pytest.raises(BadSetting, match="CELLPAIR_CACHE_BYTES"):
            other.make_room(100, "other")
        held.close()
        other.make_room(100, "other")
    assert not folder.exists()
    here.at_hand(folder, held)
    assert (folder / "part-1.bin").read_bytes() == FILES["part-1.bin"]


def test_an_object_larger_than_the_cache_is_refused(store: Opened, held: Holding) -> None:
    build(store("a"))
    here = store("b", limit_bytes=9000)
    folder, *_ = build(here, never)
    with pytest.raises(BadSetting, match="raise CELLPAIR_CACHE_BYTES"):
        here.at_hand(folder, held)


@pytest.mark.parametrize(
    "url",
    [
        "s3://name:secret@bucket/folder",
        "https://host/he.ome.tif?X-Amz-Signature=secret",
        "file:///somewhere",
        "unheard-of://host/folder",
        "s3:///nowhere",
        "simplecache::s3://bucket/folder",
    ],
)
def test_urls_that_hold_credentials_or_are_of_no_use_are_refused(url: str) -> None:
    with pytest.raises(BadInput) as error:
        remote_path(url)
    assert "secret" not in str(error.value)
