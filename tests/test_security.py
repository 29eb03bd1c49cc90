"""What must never happen: code run from files, shells, secrets in logs, patients in outputs.

Dask pickles what it sends; that stays between processes of one run, on loopback unless a person
names a scheduler elsewhere. A training hands its reading processes their job, pickled, over a pair
of sockets that nobody else can open.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from flows.cli import main
from flows.failures import words_of
from pairing.slide import open_slide
from pairing.xenium import open_xenium
from segmentation.network import load_model
from shards.errors import BadInput
from shards.stream import read_stream
from tests.flows.ruined import HE_MPP, copy_by_links, experiment, replace

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("flows", "pairing", "segmentation", "shards", "trainer", "infra", "benchmarks")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# ---------------------------------------------------------------- what the code may not say

UNPICKLING = {"cloudpickle", "dill", "joblib", "jsonpickle", "marshal", "shelve"}
# Calls that read a pickle, run text as code, go through a shell, or unpack what an archive says.
FORBIDDEN = re.compile(
    r"(pickle\.(load|loads|Unpickler)|(pd|pandas)\.read_pickle|eval|exec|compile"
    r"|os\.(system|popen|exec\w+|spawn\w+)|subprocess\.(getoutput|getstatusoutput)"
    r"|yaml\.(load|load_all|unsafe_load|full_load)|pty\.spawn"
    r"|(.*\.)?(extractall|read_pickle|unpack_archive)|tempfile\.mktemp)"
)
# Calls that are safe with a keyword, and only with it.
NEEDED = {
    "torch.load": ("weights_only", True),
    "load_checkpoint": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "np.save": ("allow_pickle", False),
    "np.lib.format.write_array": ("allow_pickle", False),
    "np.lib.format.read_array": ("allow_pickle", False),
}


def faults_of(source: str) -> Iterator[str]:
    """What a file says that it may not, with its line."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            for name in names:
                if (name or "").split(".")[0] in UNPICKLING:
                    yield f"{node.lineno}: imports {name}"
            of_pickle = isinstance(node, ast.ImportFrom) and node.module == "pickle"
            if of_pickle and {a.name for a in node.names} != {"UnpicklingError"}:
                yield f"{node.lineno}: imports from pickle"
        if isinstance(node, ast.Call):
            yield from (f"{node.lineno}: {fault}" for fault in faults_of_call(node))


def faults_of_call(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    keywords = {k.arg: k.value for k in call.keywords}
    if FORBIDDEN.fullmatch(name):
        yield f"calls {name}"
    if name in NEEDED:
        keyword, value = NEEDED[name]
        given = keywords.get(keyword)
        if not isinstance(given, ast.Constant) or given.value is not value:
            yield f"{name} without {keyword}={value}"
    if "shell" in keywords:
        yield f"{name} with shell="
    command = call.args[0] if name.startswith("subprocess.") and call.args else None
    if isinstance(command, ast.Constant | ast.JoinedStr | ast.BinOp):
        yield f"{name} of a text, not of a list"
    # One variable may be asked for; all of them may go nowhere but to a child.
    if any(ast.unparse(a) in ("os.environ", "environ") for a in call.args) and name != "dict":
        yield f"{name} of the whole environment"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_from_files_and_no_shell(path: Path) -> None:
    assert list(faults_of(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "import pickle\npickle.load(file)",
        "from pickle import loads",
        "import joblib",
        "pd.read_pickle(path)",
        "yaml.load(text)",
        "eval(text)",
        "os.system('ls')",
        "subprocess.run('ls')",
        "subprocess.run(f'ls {path}')",
        "subprocess.run(['ls'], shell=True)",
        "archive.extractall(folder)",
        "print(os.environ)",
        "log.info('%s', os.environ)",
    ],
)
def test_the_walk_sees_what_it_looks_for(source: str) -> None:
    assert list(faults_of(source))


# ---------------------------------------------------------------- files that would run code


class Touch:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_the_trap_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Touch(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_weights_run_no_code(tmp_path: Path) -> None:
    torch.save({"W2": Touch(tmp_path / "ran")}, tmp_path / "weights")
    with pytest.raises(BadInput, match="Cellpose 4 weights"):
        load_model(str(tmp_path / "weights"))
    assert not (tmp_path / "ran").exists()


PICKLED_CHUNKS = (
    {"dtype": "<u4", "filters": [{"id": "pickle"}], "compressor": None},
    {"dtype": "<u4", "compressor": {"id": "pickle"}},
    {"dtype": "|O", "filters": [{"id": "pickle"}], "compressor": None, "fill_value": None},
    {"dtype": "|O", "filters": [{"id": "vlen-utf8"}, {"id": "pickle"}], "fill_value": None},
)


@pytest.mark.parametrize("how", PICKLED_CHUNKS)
def test_masks_run_no_code(simulated: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    path = copy_by_links(simulated, tmp_path / "run") / "outs" / "cells.zarr.zip"
    with zipfile.ZipFile(path) as whole:
        members = {name: whole.read(name) for name in whole.namelist()}
    said = {**json.loads(members["cell_id/.zarray"]), **how}
    members["cell_id/.zarray"] = json.dumps(said).encode()
    members["cell_id/0.0"] = pickle.dumps(Touch(tmp_path / "ran"))
    path.unlink()
    with zipfile.ZipFile(path, "w") as evil:
        for name, content in members.items():
            evil.writestr(name, content)
    with (
        pytest.raises(BadInput, match=r"cells\.zarr\.zip"),
        open_xenium(tmp_path / "run" / "outs") as run,
    ):
        run.read_nuclei()
    assert not (tmp_path / "ran").exists()


def test_a_zip_larger_than_the_disk_is_not_unpacked(simulated: Path, tmp_path: Path) -> None:
    """A bomb declares what it unpacks to; more than that is never read of it."""
    name, bomb = "transcripts.parquet", tmp_path / "outs.zip"
    with zipfile.ZipFile(bomb, "w") as archive:
        for path in (simulated / "outs").iterdir():
            if path.is_file():
                archive.write(path, path.name)
        info = archive.getinfo(name)
        info.file_size = 1 << 60  # as the central directory says it
    with open_xenium(bomb) as run, pytest.raises(BadInput, match=rf"{name}(?s:.*)has room for"):
        list(run.iter_transcripts())


# ---------------------------------------------------------------- secrets


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hunter2@host:4200/api",
        "https://hunter2@host/api",
        "tls://user:hun:ter2@1.2.3.4:8786",
        "s3://KEY:hunter2@bucket/x",
        "postgresql+asyncpg://user:p@hunter2@host/db",
    ],
)
def test_words_of_errors_leave_out_what_logs_in(url: str) -> None:
    errors = (
        BadInput(f"PREFECT_API_URL {url}", expected="e", found=f"401 for '{url}'", remedy="r"),
        RuntimeError(f"no answer from {url}, given twice: {url}"),
        OSError(f"connect to {url}"),
    )
    for error in errors:
        told = words_of(error)
        assert not re.search(r"hunter2|hun:ter2|KEY|user", told)
        assert "://***@" in told


def test_words_of_errors_keep_plain_urls() -> None:
    for text in ("http://host:4200/api?q=a@b", "see a@b.c: tcp://127.0.0.1:8786", "x://"):
        assert words_of(RuntimeError(text)) == f"RuntimeError: {text}"


# ---------------------------------------------------------------- patients

PATIENT = "Roe, Jane"
SECRETS = (
    PATIENT, "Jane", "04/12/19", "11:22:33", "2019:04:12", "2019-04-12", "SS9876", "Mabuse",
    "HOST-4711", "BARCODE-0815", "S19-1234", "run of Jane", "region Jane", "SN-31337",
)  # fmt: skip
# The colours of labels and macro pictures, which no tissue has.
POISON = np.tile(np.array([[(0, 255, 1), (1, 0, 255)]], np.uint8), (200, 150, 1))
TAGS: dict[str, Any] = {
    "datetime": "2019:04:12 11:22:33",
    "software": "Mabuse Scanner",
    "extratags": [(315, "s", 0, "Dr Mabuse", True), (316, "s", 0, "HOST-4711", True)],
}
APERIO = (
    "Aperio Image Library v12.0.15 \r\n{size} |AppMag = 40|MPP = 0.2738|Left = 1.0"
    "|Date = 04/12/19|Time = 11:22:33|ScanScope ID = SS9876|User = Mabuse"
    "|Patient = Roe, Jane|Filename = S19-1234|BarCode = BARCODE-0815"
)


def svs(path: Path, image: Any) -> None:
    size = f"{image.shape[1]}x{image.shape[0]}"
    options: dict[str, Any] = {"photometric": "rgb", "metadata": None, "compression": "deflate"}
    with tifffile.TiffWriter(path) as out:
        out.write(image, tile=(256, 256), description=APERIO.format(size=size), **options, **TAGS)
        out.write(POISON, description=f"Aperio\r\nlabel {PATIENT}", subfiletype=1, **options)
        out.write(POISON, description="Aperio\r\nmacro BARCODE-0815", subfiletype=9, **options)


def ome(path: Path, image: Any) -> None:
    sizes = {"axes": "YXS", "PhysicalSizeX": HE_MPP, "PhysicalSizeY": HE_MPP}
    told = {
        "Name": "S19-1234",
        "AcquisitionDate": "2019-04-12T11:22:33",
        "Description": f"{PATIENT}, scanned by Mabuse on SS9876",
    }
    options: dict[str, Any] = {"photometric": "rgb", "compression": "deflate"}
    with tifffile.TiffWriter(path, ome=True) as out:
        out.write(image, tile=(256, 256), metadata={**sizes, **told}, **options, **TAGS)
        out.write(POISON, metadata={**sizes, "Name": "label image"}, **options)
        out.write(POISON, metadata={**sizes, "Name": "macro image"}, **options)


MAKERS: dict[str, Callable[[Path, Any], None]] = {"a.svs": svs, "b.ome.tif": ome}
RUN = """
[[runs]]
id = "{run}"
xenium = "{folder}/outs"
slide = "{folder}/{slide}"
alignment = "{folder}/he_imagealignment.csv"
donor = "{run}"
"""


@pytest.fixture(scope="module")
def of_patients(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs whose bundle and slide are full of a patient; of each slide a broken copy too."""
    folder = tmp_path_factory.mktemp("patients")
    image = tifffile.imread(simulated / "he.ome.tif", level=0)
    text = 'name = "n"\nout = "out"\n[segmentation]\nmodel = "none"\n'
    text += "[filters]\nmax_registration_error_um = 60\n"
    text += "[split.fractions]\ntrain = 1.0\n"
    for number, (slide, write) in enumerate(MAKERS.items()):
        for run in (f"whole{number}", f"cut{number}", f"garbage{number}"):
            copy = copy_by_links(simulated, folder / run)
            experiment(
                run_name="run of Jane", region_name="region Jane", cassette_name=PATIENT,
                run_start_time="2019-04-12T11:22:33Z", slide_id="BARCODE-0815",
                instrument_sn="SN-31337",
            )(copy)  # fmt: skip
            write(copy / slide, image)
            content = (copy / slide).read_bytes()
            if run.startswith("cut"):
                replace(copy / slide, content[: len(content) // 2])
            elif run.startswith("garbage"):
                # Past the header every byte of the pixels is another: no tile can be decoded.
                with tifffile.TiffFile(copy / slide) as tiff:
                    page = tiff.pages.first
                    places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
                spoiled = bytearray(content)
                for offset, count in places:
                    spoiled[offset : offset + count] = b"\xff" * count
                replace(copy / slide, bytes(spoiled))
            text += RUN.format(run=run, folder=run, slide=slide)
    (folder / "curate.toml").write_text(text)
    return folder


@pytest.fixture(scope="module", params=list(MAKERS))
def small_slide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("small") / request.param
    MAKERS[request.param](path, np.random.default_rng(0).integers(99, 200, (300, 280, 3), np.uint8))
    return path


def places_of_tags(path: Path) -> list[int]:
    """Where a TIFF holds anything but pixels."""
    n_bytes = path.stat().st_size
    is_tag = np.ones(n_bytes, bool)
    with tifffile.TiffFile(path) as file:
        for page in file.pages:
            for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
                is_tag[offset : offset + count] = False
    return np.flatnonzero(is_tag).tolist()


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_slide_with_broken_tags_is_refused_in_words_that_quote_none_of_them(
    small_slide: Path, data: st.DataObject, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.clear()
    content = bytearray(small_slide.read_bytes())
    places = st.sampled_from(places_of_tags(small_slide))
    if data.draw(st.booleans()):
        del content[data.draw(places) :]
    else:
        for place in data.draw(st.lists(places, min_size=1, max_size=3)):
            content[place] = data.draw(st.integers(0, 255))
    broken = small_slide.with_name(f"broken-{small_slide.name}")
    broken.write_bytes(content)
    try:
        with open_slide(broken) as slide:
            slide.read((0, 0, 100, 100))
            told = " ".join(slide.notes)
    except BadInput as error:
        told = str(error)
    told += caplog.text
    assert not [secret for secret in SECRETS if secret in told]


def texts_of(path: Path) -> Iterator[bytes]:
    """The content of a file as it is, and what compression hides of it."""
    yield path.read_bytes()
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        yield repr((table.schema.to_string(show_schema_metadata=True), table.to_pylist())).encode()


def pictures_of(path: Path) -> Iterator[Any]:
    if path.suffix in {".png", ".jpg", ".jpeg"}:
        yield np.asarray(Image.open(path).convert("RGB"))
    if path.suffix == ".html":
        for found in re.findall(
            r"data:image/\w+;base64,([A-Za-z0-9+/=]+)", path.read_text("utf-8")
        ):
            yield np.asarray(Image.open(io.BytesIO(base64.b64decode(found))).convert("RGB"))


def shows_a_label(image: Any) -> bool:
    flat = image.reshape(-1, 3).astype(int)
    return any((np.abs(flat - colour).max(axis=1) < 40).sum() > 4 for colour in POISON[0, :2])


def test_no_patient_and_no_scan_date_is_anywhere(
    of_patients: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert shows_a_label(POISON)
    config = str(of_patients / "curate.toml")
    main(["curate", config, "--workers", "1", "--partial"])
    for slide, run in zip(MAKERS, ("whole0", "whole1"), strict=True):
        assert main(["info", str(of_patients / run / slide)]) == 0
        assert main(["info", str(of_patients / run / slide), "--json"]) == 0
        assert main(["info", str(of_patients / run / "outs")]) == 0
    said = capfd.readouterr()
    for text in (said.out, said.err, caplog.text):
        assert not [secret for secret in SECRETS if secret in text]
    out = of_patients / "out"
    stream = read_stream([out], "train")
    assert len(stream) == 600
    written = [path for path in out.rglob("*") if path.is_file()]
    assert {p.suffix for p in written} >= {".tar", ".parquet", ".json", ".html", ".log"}
    for path in written:
        for content in texts_of(path):
            for secret in SECRETS:
                assert secret.encode() not in content, f"{secret} in {path.relative_to(out)}"
                assert secret.encode("utf-16-le") not in content
        assert not any(map(shows_a_label, pictures_of(path))), path
    for sample in stream.read(range(0, len(stream), 7)):
        assert not shows_a_label(np.asarray(Image.open(io.BytesIO(sample.jpeg)).convert("RGB")))
