"""The documentation says what the tests show."""

import re

from data_table import PAGE, page_with, tables

from bilora_ray.config import FACTS


def test_the_tables_of_data_are_those_of_the_cases() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page_with(text, tables()) == text, "python tests/data_table.py writes them anew"
    assert sum(table.count("\n") - 2 for table in tables().values()) >= 60


def test_the_page_of_data_names_settings_that_there_are() -> None:
    text = PAGE.read_text(encoding="utf-8").partition("<!-- files -->")[0]
    named = set(re.findall(r"`([a-z0-9_]+):", text))
    assert named
    assert named <= set(FACTS)
