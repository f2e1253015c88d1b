"""Lists of levels: their spelling and their order."""

from __future__ import annotations

import re

import pytest

from colddiff.config import EvaluationConfig
from colddiff.levels import check_levels, parse_levels


def refused(text: str, allowed: str) -> str:
    return re.escape(f"levels = {text!r} is not allowed: it must be ") + f".*{allowed}"


def test_levels_are_parsed() -> None:
    assert parse_levels("20-10-0") == (20, 10, 0)
    assert parse_levels("7") == (7,)
    assert EvaluationConfig(levels=("3-0", "3-1-0")).level_lists == ((3, 0), (3, 1, 0))


@pytest.mark.parametrize("text", ["", "-", "20--0", "20-1.5-0", "20-a", " 20-0", "20 - 0", "²-0"])
def test_what_is_no_list_of_levels_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=refused(text, "20-10-0")):
        parse_levels(text)


def test_levels_must_fall_from_T_to_0() -> None:
    check_levels((20, 10, 0), 20)
    check_levels(range(20, -1, -1), 20)
    check_levels((1, 0), 1)
    for levels in ((20,), (), (19, 0), (20, 1), (20, 20, 0), (20, 5, 6, 0), (0, 20)):
        text = "-".join(map(str, levels))
        with pytest.raises(ValueError, match=refused(text, "from T = 20 to 0")):
            check_levels(levels, 20)
