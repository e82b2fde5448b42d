"""Fixtures of the launchers' tests."""

from support.launchers import project

__all__ = ["project"]
