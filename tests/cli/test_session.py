"""How the demonstration runs real programs: line by line, and never longer than it wants to."""

import sys
from time import monotonic

import pytest

from virtio.cli.output import CommandError
from virtio.cli.programs import GRACE, LONGEST_LINE, Here, Programs


class Told:
    """What programs told, by kind."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, kind: str, /, **values: object) -> None:
        if kind == "output":
            self.lines.append(str(values["text"]))


def run(body: str, told: Told, limit: float = 30) -> list[str]:
    """A program in Python, which may take so long."""
    here = Here(None, lambda: None)
    return Programs(told, here, here).run([sys.executable, "-c", body], "a program", seconds=1, limit=limit - GRACE)


@pytest.mark.parametrize("body", ["print('half a line', end='', flush=True)", "import os; os.close(1); os.close(2)", ""], ids=str)
def test_a_program_that_does_not_end_is_ended_at_the_deadline(body: str) -> None:
    told, began = Told(), monotonic()
    with pytest.raises(CommandError, match=r"no end of .*python\S* after 1 s"):
        run(f"{body}\nimport time\ntime.sleep(120)", told, limit=1)
    assert monotonic() - began < 60 and told.lines == []


def test_lines_come_whole_however_they_are_printed() -> None:
    told = Told()
    body = "import sys\nfor part in ('one', '\\ntw', 'o\\n', '\\nlast'): print(part, end='', flush=True)"
    assert run(body, told) == told.lines == ["one", "two", "", "last"]


def test_a_line_without_end_is_cut() -> None:
    told = Told()
    assert run(f"print('x' * {2 * LONGEST_LINE + 5}, end='', flush=True)", told) == ["x" * LONGEST_LINE] * 2 + ["x" * 5]


def test_a_program_that_fails_says_why() -> None:
    with pytest.raises(CommandError, match=r"python\S* failed: why"):
        run("print('before'); print('why'); print(); raise SystemExit(3)", Told())
    with pytest.raises(CommandError, match=r"python\S* was ended by SIGKILL"):
        run("import os; os.kill(os.getpid(), 9)", Told())
