"""Write the table of supported layers, made from the registry, into the pages that show it."""

from __future__ import annotations

from pathlib import Path

from lightning_compressm.families import support_table

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- families:begin -->\n", "<!-- families:end -->"


def main() -> None:
    for page in (ROOT / "README.md", ROOT / "docs" / "supported.md"):
        before, rest = page.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END)[1]
        page.write_text(f"{before}{BEGIN}{support_table()}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
