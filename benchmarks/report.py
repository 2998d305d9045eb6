"""Where the figures of benchmarks go: JSON beside the script, tables in README.md and on the terminal."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from pipeline_lib.artifacts.files import read_json, write_bytes, write_json
from pipeline_lib.artifacts.provenance import commit, hardware, versions

FOLDER = Path(__file__).resolve().parent
INTRODUCTION = """# Benchmarks

Made by `make bench`, from the JSON files beside this page; each script says what it measures and how.
Every ratio compares runs of one machine, taken in turn.
"""
UNMEASURED = {
    "bitflip_gpu": """## bitflip_gpu

The speed of bit flips on a GPU is unmeasured: no GPU was at hand. On a machine that has one,
`pip install mase-triton==0.0.7` and then `python -m benchmarks.bitflip_gpu` measure it and write the table here.
""",
    "int2_gpu": """## int2_gpu

The speed of packed 2-bit weights on a GPU is unmeasured: no GPU was at hand. On a machine that has one,
`pip install gemlite` and then `python -m benchmarks.int2_gpu` measure it, say which goals are met and write the table
here.
""",
    "optical_gpu": """## optical_gpu

The speed of optical products on a GPU is unmeasured: no GPU was at hand. On a machine that has one,
`python -m benchmarks.optical_gpu` measures it and writes the table here.
""",
    "ternary_gpu": """## ternary_gpu

The speed of packed ternary products on a GPU is unmeasured: no GPU was at hand. On a machine that has one,
`python -m benchmarks.ternary_gpu` measures it and writes the table here. Goals: at least 2 times as fast as unpack +
linear, at most 0.25 of the bytes of bf16 (0.2 by the layout), at one row at least 2.5 times as fast as bf16.
""",
}


def machine() -> dict[str, Any]:
    """Hardware, versions and commit, for the JSON."""
    return {"hardware": hardware(), "versions": versions(), "commit": commit()}


def table(rows: list[dict[str, Any]], heads: list[str] | None = None) -> str:
    """Rows as Markdown; `heads` orders the columns (default: as in the first row)."""
    heads = heads or list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(_shown(row[head]) for head in heads) + " |" for row in rows)])


def _shown(value: Any) -> str:
    return "–" if value is None else str(value)


def write(name: str, figures: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Commit-ready JSON (`figures`, the machine and the table's rows), the page of all benchmarks, and the table."""
    write_json(FOLDER / f"{name}.json", {**machine(), **figures, "columns": list(rows[0]), "rows": rows})
    write_bytes(FOLDER / "README.md", page().encode())
    print(table(rows))


def page() -> str:
    """README.md: the table of every JSON file here, from the files alone, and what is not measured."""
    measured = [_section(path) for path in sorted(FOLDER.glob("*.json"))]
    missing = [text for name, text in UNMEASURED.items() if not (FOLDER / f"{name}.json").exists()]
    return "\n".join([INTRODUCTION, *measured, *missing])


def _section(path: Path) -> str:
    figures = read_json(path)
    doc = ast.get_docstring(ast.parse(path.with_suffix(".py").read_text())) or ""
    hardware, versions = figures["hardware"], figures["versions"]
    used = f"torch {versions['torch']}, commit {figures['commit'][:12]}"
    where = f"{hardware['processor']}, {hardware['cores']} cores, {used}"
    return f"## {path.stem}\n\n{doc.splitlines()[0]}\n\n{table(figures['rows'], figures.get('columns'))}\n\n{where}.\n"
