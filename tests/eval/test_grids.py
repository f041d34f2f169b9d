"""Tables: what people see leaves out empty columns, the CSV keeps all."""

from __future__ import annotations

from dre_fast.eval.grids import Grid


def test_columns_without_a_filled_cell(tmp_path):
    grid = Grid(["task", "column", "value", "note"], [["a", None, 0.5, ""], ["b|c", None, None, ""]])
    assert grid.markdown() == "| task | value |\n| --- | --- |\n| a | 0.500 |\n| b\\|c |  |\n"
    assert grid.text() == "task  value\na     0.500\nb|c"
    grid.write(tmp_path / "scores")
    assert (tmp_path / "scores.csv").read_text() == "task,column,value,note\na,,0.5,\nb|c,,,\n"
    assert (tmp_path / "scores.md").read_text() == grid.markdown()


def test_a_table_without_rows_has_its_header():
    assert Grid(["task", "note"], []).markdown() == "| task | note |\n| --- | --- |\n"
    assert Grid(["task", "note"], []).text() == "task  note"
