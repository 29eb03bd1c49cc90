"""The texts about each run: true, complete, and nothing in them but text."""

from __future__ import annotations

import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from flows.cluster import Runtime
from flows.config import CurateConfig, read_curate_config
from flows.local import run_pipeline
from flows.pipeline import Built, Curated
from flows.qc import (
    artifact_key,
    dataset_markdown,
    escaped,
    failure_markdown,
    n_stages,
    run_markdown,
)
from shards.errors import BadInput

CURATE_TOML = """
name = "pilot <b>|"
out = "curated"
[segmentation]
model = "none"
[filters]
min_counts = 60
[split]
assign = {{ D1 = "train" }}
[[runs]]
id = "run-a"
xenium = "{section}/outs"
slide = "{section}/he.ome.tif"
alignment = "{section}/he_imagealignment.csv"
donor = "D1"
[[runs]]
id = "Run_B"
xenium = "empty"
image = "morphology"
donor = "D1"
"""


@pytest.fixture(scope="module")
def curated(
    tmp_path_factory: pytest.TempPathFactory, simulated: Path
) -> tuple[CurateConfig, Curated, list[str]]:
    """One run curated, one failed, and the stages that were called."""
    folder = tmp_path_factory.mktemp("qc") / "räume (1)"
    (folder / "empty").mkdir(parents=True)
    path = folder / "curate.toml"
    path.write_text(CURATE_TOML.format(section=simulated), encoding="utf-8")
    config = read_curate_config(path)
    calls = []

    def call(name: str, make: Callable[[], Built]) -> Built:
        calls.append(name)
        return make()

    return config, run_pipeline(config, Runtime(workers=1), call=call), calls


def test_a_run_tells_totals_verdict_drops_stages_and_where_its_page_is(
    curated: tuple[CurateConfig, Curated, list[str]],
) -> None:
    config, result, _ = curated
    (run,) = result.runs
    html = _rendered(run_markdown(config, run))
    totals = run.built["shards"].summary
    assert 0 < totals["kept"] < totals["seen"]
    rows = dict(re.findall(r"<td>(.*?)</td>\s*<td>(\d+)</td>", html))
    assert rows["seen"] == str(totals["seen"])
    assert rows["kept"] == str(totals["kept"])
    dropped = [int(n) for what, n in rows.items() if what.startswith("dropped: ")]
    assert sum(dropped) == totals["seen"] - totals["kept"]
    assert "<strong>pass</strong>" in html
    for stage, built in run.built.items():
        assert re.search(rf"<td>{stage}</td>\s*<td>made</td>\s*<td>{built.fingerprint}</td>", html)
    (target,) = re.findall(r'href="(.*?)"', html)
    page = Path(unquote(urlsplit(unescape(target)).path))
    assert page == config.out / "report" / "run-a.html"
    assert page.exists()


def test_a_dataset_with_a_failed_run_says_that_none_was_published(
    curated: tuple[CurateConfig, Curated, list[str]],
) -> None:
    config, result, _ = curated
    html = _rendered(dataset_markdown(config, result))
    assert "No dataset was published" in html
    assert "<p>Run_B failed</p>" in html
    assert "<h1>pilot &lt;b&gt;|</h1>" in html
    failure = _rendered(failure_markdown("Run_B", result.failures["Run_B"]))
    assert str(config.runs[1].xenium) in unescape(failure)


def test_as_many_stages_as_are_known_before_are_called(
    curated: tuple[CurateConfig, Curated, list[str]],
) -> None:
    config, _, calls = curated
    of_run_a = config.model_copy(update={"runs": config.runs[:1]})
    assert n_stages(of_run_a) == len([name for name in calls if name.startswith("run-a/")]) == 4
    assert n_stages(config) == 4 + 3


@given(st.text())
@example("<script>alert(1)</script>")
@example("a | b\n| - | - |\r\n# c\u2028[d](javascript:e)")
@example("http://evil.example www.evil.example a@evil.example `x` **y** &lt; \x00 \u202e")
def test_hostile_text_is_nothing_but_text(text: str) -> None:
    html = _rendered(escaped(f"x{text}x"))
    assert html.startswith("<p>x")
    assert html.endswith("x</p>\n")
    assert "<" not in html.removeprefix("<p>").removesuffix("</p>\n")
    in_table = _rendered(f"| a |\n| - |\n| {escaped(text)} |")
    assert in_table.count("<td>") == 1
    assert len(re.findall(r"<(?!/?(table|thead|tbody|tr|th|td)>)", in_table)) == 0


def test_hostile_words_of_a_failure_are_escaped() -> None:
    error = BadInput("<img src=x>", expected="a | b", found="# c", remedy="[d](e)")
    html = _rendered(failure_markdown("run-a", error))
    assert not re.findall(r"<(?!/?(h1|p)>)", html)
    for part in ("<img src=x>", "a | b", "# c", "[d](e)"):
        assert part in unescape(html)


@pytest.mark.parametrize(
    ("run", "key"),
    [
        ("run-a", "qc-run-a"),
        ("2024-01", "qc-2024-01"),
        ("Run_A", "qc-run-a-922a93c1"),
        ("run_a", "qc-run-a-90a466e2"),
        ("-", "qc-3973e022"),
        ("../<x>", "qc-x-8f25f428"),
    ],
)
def test_a_key_of_a_run_is_what_the_server_takes(run: str, key: str) -> None:
    assert artifact_key(run) == key


@given(st.lists(st.text(min_size=1), min_size=2, max_size=2, unique=True))
def test_two_runs_never_share_a_key(runs: list[str]) -> None:
    keys = {artifact_key(run) for run in runs}
    assert len(keys) == 2
    assert all(re.fullmatch(r"qc(-[a-z0-9]+)+", key) for key in keys)


def _rendered(markdown: str) -> str:
    """HTML by a reader of CommonMark and tables that lets HTML through, as browsers would."""
    reader = MarkdownIt("commonmark", {"html": True}).enable("table")
    reader.validateLink = lambda url: True  # it would leave links to files as text
    rendered: str = reader.render(markdown)
    return rendered
