"""A finished run as one page, ``report.html``, made of the files in the run's folder alone."""

from dynrank.html_report.page import REPORT_FILE, write_report

__all__ = ["REPORT_FILE", "write_report"]
