"""The exceptions for wrong settings."""

from __future__ import annotations


class Misfit(ValueError):
    """Two values contradict each other, although each is valid.

    Attributes:
        settings: the dotted names of both, with the number of an item where it is a list. The error is reported at the
            first that was set.
    """

    def __init__(self, setting: str, text: str, *others: str) -> None:
        super().__init__(text)
        self.settings = (setting, *others)


class ConfigurationError(Exception):
    """The settings cannot be used. The text has one line for each error."""
