"""report: everything that config.yaml lists, on one page."""

from __future__ import annotations

from pipeline_lib.artifacts.files import write_bytes
from pipeline_lib.artifacts.job import Job
from pipeline_lib.reporting.collect import collect
from pipeline_lib.reporting.html import draw, render


def run(job: Job) -> None:
    """Write report.html, tables/*.csv and *.md, plots/*.svg and *.png."""
    collected = collect(job.settings, job.inputs)
    pictures = draw(collected)
    for name, grid in collected.grids.items():
        write_bytes(job.out / "tables" / f"{name}.csv", grid.csv().encode())
        write_bytes(job.out / "tables" / f"{name}.md", grid.markdown().encode())
    for found in pictures.values():
        for picture in found:
            write_bytes(job.out / "plots" / f"{picture.name}.svg", picture.svg.encode())
            write_bytes(job.out / "plots" / f"{picture.name}.png", picture.png)
    write_bytes(job.out / "report.html", render(collected, pictures).encode())
