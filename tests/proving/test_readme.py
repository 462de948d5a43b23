"""The README's table of chapters is the one that is made, and the rest of a README stays."""

from pathlib import Path

import pytest

from course_lib.lab.chapters import written
from course_lib.proving import readme
from course_lib.proving.readme import BEGIN, END, table, with_table

ROOT = Path(__file__).resolve().parents[2]


def test_the_readme_has_this_table():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_table(text, written(ROOT)) == text, "make it anew: python -m course_lib.proving.readme"


def test_the_table_links_what_is_ready():
    lines = table({2}).splitlines()
    assert len(lines) == 2 + 18
    assert lines[4] == "| 2 | [Optimizers](notebooks/02_optimizers.ipynb): from momentum to Muon | optimizer | ready |"
    assert lines[5].startswith("| 3 | Learning rate: ")
    assert lines[5].endswith("| schedule | to come |")


def test_the_rest_of_a_readme_stays():
    text = f"# Title\n\n{BEGIN}\nold\n{END}\n\nMore.\n"
    new = with_table(text, set())
    assert new.startswith(f"# Title\n\n{BEGIN}\n\n| |")
    assert new.endswith(f"|\n\n{END}\n\nMore.\n")
    assert with_table(new, set()) == new


@pytest.mark.parametrize("text", ["nothing", BEGIN, f"{END} {BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_readme_without_markers_is_refused(text):
    with pytest.raises(ValueError, match=r"README\.md must hold"):
        with_table(text, set())


def test_the_command_writes_the_table(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text(f"a\n{BEGIN}\n{END}\n")
    monkeypatch.setattr(readme, "checkout", lambda: tmp_path)
    assert readme.main() == 0
    assert "| 17 | Trends, open questions, FAQ" in (tmp_path / "README.md").read_text()
