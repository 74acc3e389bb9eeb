"""Checkpoints without layout: written on some ranks, read on any others."""
