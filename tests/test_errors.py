"""An error's text is one short line that can be seen, whatever names it repeats."""

import pickle

import pytest

from bootvit.errors import LONGEST, OneLine, RunFailed, UserError, one_line


@pytest.mark.parametrize("kind", [UserError, RunFailed])
def test_names_cannot_break_a_line(kind: type[OneLine]) -> None:
    err = kind("a\nb\tc\x00\x1b[1m\u2028\udce9 ünï 日本 🙂 \\n")
    assert str(err) == "a\\nb\\tc\\x00\\x1b[1m\\u2028\\udce9 ünï 日本 🙂 \\n"
    again = pickle.loads(pickle.dumps(err))  # as Ray does
    assert (type(again), str(again)) == (kind, str(err))


def test_a_long_value_loses_its_middle_and_keeps_the_reason() -> None:
    text = f"x.yaml: name={'a' * 5000}: too long"
    short = one_line(text)
    assert len(short) == LONGEST
    assert short.startswith("x.yaml: name=aaa")
    assert short.endswith("aaa: too long")
    assert " ... " in short
    assert one_line(short) == short
    assert one_line("b" * LONGEST) == "b" * LONGEST
