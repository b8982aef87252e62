"""Sweeps with runs that only write a report."""

import csv
import math

from conftest import command_line

from prunekit.errors import DataError
from prunekit.report import Report
from prunekit.runtime.files import write_text


def report_of(ratio):
    """A report whose perplexity grows with the ratio: exp(3 + ratio) and its square."""
    return Report.from_plain(
        {
            "task": "prune",
            "models": ["dense", "pruned"],
            "ratio": {"target": ratio, "achieved": ratio},
            "parameters": {"dense": 1000, "pruned": round(1000 * (1 - ratio))},
            "perplexity": {
                "a": {"dense": math.exp(3), "pruned": math.exp(3 + ratio), "protocol": "p"},
                "b": {"dense": math.exp(6), "pruned": math.exp(6 + 2 * ratio), "protocol": "p"},
            },
        }
    )


def only_report(monkeypatch):
    """`jobs.run` only writes a report. The ratios that it was asked for, and those that fail."""
    asked = []
    broken = {0.5: DataError("corpus: <nothing> there"), 0.6: ZeroDivisionError("a bug")}

    def run(config, folder, *_):
        asked.append(config.ratio)
        if error := broken.get(config.ratio):
            raise error
        write_text(folder / "report.json", report_of(config.ratio).to_json())
        return report_of(config.ratio)

    monkeypatch.setattr("prunekit.jobs.run", run)
    monkeypatch.setattr("prunekit.sweeps.page.draw_pareto", lambda lines: None)
    return asked, broken


def rows_of(folder):
    return list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))


def sweep(*arguments, cwd):
    return command_line("-m", "hydra.sweep.dir=sweep", *arguments, cwd=cwd)
