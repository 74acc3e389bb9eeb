"""Routing, planning, dispatch and experts: the parts of a mixture-of-experts layer."""
