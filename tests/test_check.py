"""`python -m llamba_ref.check`: what it says of right and wrong answers, and how it ends."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llamba_ref.check import all_exercises, main

RIGHT = "def decay_ratio(log_a, s, t):\n    return log_a[s + 1 : t + 1].sum().exp()\n"


@pytest.fixture
def answer(tmp_path, monkeypatch, capsys):
    """Check the text of an answer to 01.3: how it ends, and what it says."""

    def run(text, exercise="01.3", name="mine.py", seconds=120):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "mine.py").write_text(text)
        code = main(exercise, Path(name), seconds)
        out, err = capsys.readouterr()
        return code, out + err

    return run


def test_a_right_answer(answer):
    assert answer(RIGHT) == (0, "01.3 ex-core-ratio: right\n")
    assert answer(RIGHT, "1.3")[0] == answer(RIGHT, "ex-core-ratio")[0] == 0


@pytest.mark.parametrize(("text", "says"), [
    ("def decay_ratio(log_a, s, t):\n    return log_a[s : t + 1].sum().exp()\n", "the relative error is"),
    ("def decay_ratio(log_a, s, t):\n    return (log_a.cumsum(0)[t] - log_a.cumsum(0)[s]).exp()\n", "strong gates"),
    ("def ratio(log_a, s, t): ...\n", "mine.py does not define decay_ratio"),
    ("def decay_ratio(log_a, s, t): ...\n", "the check cannot use decay_ratio: AttributeError"),
    ("def decay_ratio(log_a, s, t):\n    x = 1\n    return x / 0\n", "mine.py, line 3 raises ZeroDivisionError"),
    ("def decay_ratio(log_a):\n    return log_a\n", "TypeError: decay_ratio() takes 1"),
    ("decay_ratio = 3\n", "the check cannot use decay_ratio: TypeError"),
    ("import torch\nraise SystemExit\n", "mine.py, line 2 raises SystemExit"),
    ("def decay_ratio(:\n", "mine.py, line 1 raises SyntaxError"),
    ("import nowhere\n", "mine.py, line 1 raises ModuleNotFoundError"),
])
def test_a_wrong_answer_is_told_in_a_line(answer, text, says):
    code, said = answer(text)
    assert code == 1 and says in said and said.count("\n") == 1 and len(said) < 500


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="this system has no alarm")
@pytest.mark.parametrize("text", [
    "while True: pass\n",
    "def decay_ratio(log_a, s, t):\n    while True:\n        try: 1 / 0\n        except Exception: pass\n",
])
def test_an_answer_without_end_is_ended(answer, text):
    before = signal.getsignal(signal.SIGALRM)
    assert answer(text, seconds=0.2) == (1, "01.3: mine.py does not end within 0.2 seconds\n")
    assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_what_an_answer_prints_is_not_shown_and_nobody_is_asked(answer):
    assert answer("print(1)\n" + RIGHT.replace("    return", "    print(2)\n    return")) == (
        0, "01.3 ex-core-ratio: right\n")
    assert "line 1 raises EOFError" in answer("name = input('name? ')\n" + RIGHT)[1]


@pytest.mark.parametrize(("exercise", "name", "says"), [
    ("01.9", "mine.py", "there is no exercise 01.9"),
    ("ex-core-ration", "mine.py", "did you mean ex-core-ratio"),
    ("nonsense", "mine.py", "there is no exercise nonsense"),
    ("01.3", "yours.py", "there is no file yours.py"),
    ("01.3", ".", "there is no file ."),
    ("ex-scan-tanh", "mine.py", "is done on paper"),
])
def test_a_command_that_makes_no_sense(answer, exercise, name, says):
    code, said = answer(RIGHT, exercise, name)
    assert code == 2 and says in said and said.count("\n") == 1


def test_it_lists_all_exercises_and_says_what_one_wants(capsys):
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(all_exercises()) > 100
    assert ["01.3", "ex-core-ratio", "decay_ratio"] in [line.split()[:3] for line in lines]
    assert main("7.4") == 0
    assert "An answer defines ssd_packed." in capsys.readouterr().out


def test_the_program_ends_with_these_codes(tmp_path):
    (tmp_path / "mine.py").write_text(RIGHT)
    for words, code in (("1.3 mine.py", 0), ("1.1 mine.py", 1), ("1.99", 2), ("1.3 mine.py more", 2)):
        command = [sys.executable, "-m", "llamba_ref.check", *words.split()]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr


def test_numbers_are_chapters_and_places():
    numbers = [one.number for one in all_exercises()]
    assert len(set(numbers)) == len(numbers) and numbers == sorted(numbers)
