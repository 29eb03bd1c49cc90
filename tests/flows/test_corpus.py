"""A corpus of a dozen runs: composed, one more, held out of, withdrawn from; nothing else moves."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.corpus.story import corpus
from benchmarks.registration.limits import Limits


# 13 simulated runs, each curated, a few of them again: minutes.
@pytest.mark.slow
def test_a_corpus_is_composed_grows_and_forgets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = Limits()
    corpus(tmp_path / "corpus", 60, limits)
    told = capsys.readouterr().out
    assert limits.met, told
    assert "NOT MET" not in told
