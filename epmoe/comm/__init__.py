"""Collectives as differentiable functions."""
