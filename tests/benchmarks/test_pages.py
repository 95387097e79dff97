"""Pages that several commands write to."""

from pathlib import Path

import pytest

from benchmarks.common.pages import part, read_part, with_part, write_part

PAGE = f"# Title\n\n{part('one', 'first')}\n\n{part('two', 'second')}\n"


def test_a_part_is_replaced_and_nothing_else() -> None:
    page = with_part(PAGE, "one", "| a |\n| b |\n")
    assert read_part(page, "one") == "| a |\n| b |"
    assert with_part(page, "one", "first") == PAGE


def test_a_page_that_is_not_there_becomes_the_part_alone(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    write_part(path, "one", "first")
    write_part(path, "one", "again")
    assert path.read_text() == part("one", "again") + "\n"


@pytest.mark.parametrize("page", ["", PAGE + PAGE, "<!-- one:end --> <!-- one:begin -->"])
def test_marks_that_are_missing_or_doubled_are_named(page: str) -> None:
    with pytest.raises(ValueError, match="expected a page with one <!-- one:begin --> before"):
        with_part(page, "one", "text")
