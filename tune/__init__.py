"""Sweeps on Ray Tune: search spaces, fair groups, budgets, resumption.

`run_sweep` reads a sweep file and runs it. What happened is in the sweep's own log (`log.py`), not in Tune's files:
Tune executes trials, and after any crash a new Tune run goes on from what the log says.
"""
