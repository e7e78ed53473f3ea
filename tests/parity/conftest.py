"""Prints the largest error of every parity case after the tests."""

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line a case: its largest error |a - b| / (1 + |b|) and where it is."""
    lines = [
        value
        for report in terminalreporter.getreports("passed")
        for key, value in getattr(report, "user_properties", ())
        if key == "parity" and report.when == "call"
    ]
    if lines:
        terminalreporter.section("parity: largest error of each case")
        for line in lines:
            terminalreporter.write_line(line)
