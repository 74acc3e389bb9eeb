"""Build script; everything that can be said as data is in pyproject.toml."""

from setuptools import setup

setup()
