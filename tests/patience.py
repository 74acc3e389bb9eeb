"""How long tests wait for what does not come."""

HANGS_S = 480.0
"""Seconds after which a process or a collective counts as hanging: more than anything takes on a machine that is busy
with other work, and less than pytest's own limit, so that tracebacks are still printed."""
