"""Shim: pyproject.toml holds the project's metadata; the build of the native extension is added here later."""

from setuptools import setup

setup()
