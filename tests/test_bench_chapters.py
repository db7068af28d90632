"""The command that runs the chapters notices what it is there to notice."""

import nbformat
import pytest

nbclient = pytest.importorskip("nbclient")

from bench.chapters import main, run, same_text  # noqa: E402


def chapter(path, *cells):
    """A notebook of code cells, each a pair of source and the text that is saved as its output."""
    stream = lambda text: [nbformat.v4.new_output("stream", name="stdout", text=text)] if text else []
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(source, outputs=stream(text)) for source, text in cells]
        ),
        path,
    )
    return path


@pytest.mark.parametrize("saved, now, same", [
    ("loss 0.123 after 5 steps", "loss 0.123 after 5 steps", True),
    ("loss 0.123", "loss 0.124", False),
    ("loss 0.123", "cost 0.123", False),
    ("error 3e-16", "error 1.2e-15", True),  # rounding errors of one size
    ("error 3e-16", "error 4e-12", False),
    ("error 3e-16", "error 0.0e+00", True),
    ("error 2e-03", "error 3e-03", False),  # no rounding error
    ("steps 3", "steps 4", False),
    ("0 of 3", "0 of 3\n", False),
])
def test_what_counts_as_the_same(saved, now, same):
    assert same_text(saved, now, measured=False) == same
    assert same_text(saved, now, measured=True) == (saved.count("\n") == now.count("\n"))


def test_a_chapter_that_prints_what_is_saved(tmp_path):
    path = chapter(
        tmp_path / "good.ipynb",
        ("import os\nprint(os.listdir('.'))", "[]\n"),
        ("#| measured\nimport time\nprint(time.time())", "1.5\n"),
    )
    seconds, wrong, missing = run(path)
    assert 0 < seconds < 120 and not wrong and not missing


def test_a_chapter_that_prints_something_else(tmp_path):
    path = chapter(tmp_path / "stale.ipynb", ("print(1)", "1\n"), ("print(2)", "3\n"))
    (message,) = run(path)[1]
    assert "saved: '3\\n'" in message and "now:   '2\\n'" in message


def test_a_chapter_that_raises(tmp_path):
    (message,) = run(chapter(tmp_path / "broken.ipynb", ("1 / 0", "")))[1]
    assert "ZeroDivisionError" in message


def test_a_cell_that_needs_what_is_not_there(tmp_path):
    path = chapter(
        tmp_path / "optional.ipynb",
        ("#| needs: no_such_module\nprint('without')", "with\n"),
        ("#| needs: json\nprint(1)", "2\n"),
    )
    _, wrong, missing = run(path)
    assert len(wrong) == 1 and missing == {"no_such_module"}


def test_no_such_chapter():
    with pytest.raises(SystemExit, match="no chapter is called 99_nothing"):
        main(("99_nothing",))


def test_a_wrong_chapter_ends_with_an_error_and_writes_nothing(tmp_path, monkeypatch, capsys):
    chapter(tmp_path / "00_stale.ipynb", ("print(2)", "3\n"))
    monkeypatch.setattr("bench.chapters.NOTEBOOKS", tmp_path)
    monkeypatch.setattr("bench.chapters.save", lambda *_, **__: pytest.fail("written all the same"))
    with pytest.raises(SystemExit, match="1 of 1 chapters are wrong: 00_stale"):
        main(record=True)
    assert "WRONG" in capsys.readouterr().out
