"""Sweeps on Ray Tune: search spaces, fair groups, budgets, resumption.

Four rooms; imports go run -> tell -> decide -> spec and never back. `spec` is what the file says, `decide` what happens
next, `tell` what others are told, `run` what executes it. What happened is in the sweep's own log (`decide/log.py`),
not in Tune's files: a trial of the sweep is a trial of Tune's, and after any crash a new Tune run goes on from what
the log says.
"""
