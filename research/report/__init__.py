"""A run as one self-contained HTML page for people: no network, no other files."""

from research.report.page import render, write

__all__ = ["render", "write"]
