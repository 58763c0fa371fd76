"""The page, the charts and the comparison of runs, made from the files in their folders."""

from dgrpo.report.data import write_curves, write_report

__all__ = ["write_curves", "write_report"]
