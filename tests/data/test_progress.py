import pytest

from fastgpt.data import progress
from fastgpt.data.progress import shown_progress


def test_without_a_terminal_there_are_lines_with_rate_and_time_to_go(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with shown_progress("preparing x") as show:
        show(3, 2_000_000, 8_000_000)
        show(4, 4_000_000, None)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("preparing x: 3 documents, 2.0 MB, ")
    assert "(25%, eta " in first
    assert "eta" not in second


def test_lines_are_not_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    with shown_progress("preparing x") as show:
        for done in range(1000):
            show(1, done, 1000)
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with shown_progress("preparing [x]") as show:
        show(3, 2_000_000, 8_000_000)
        show(4, 2_000_000, None)
    assert "preparing [x]:" not in capsys.readouterr().out
