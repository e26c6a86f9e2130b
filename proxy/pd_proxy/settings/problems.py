"""What is wrong with settings, as exceptions."""

from __future__ import annotations


class Misfit(ValueError):
    """A value that is good by itself does not go with another one.

    Attributes:
        settings: the dotted names of the two, with the number of an item where it is a list; the first that somebody
            has set is where it is to be mended.
    """

    def __init__(self, setting: str, text: str, *others: str) -> None:
        super().__init__(text)
        self.settings = (setting, *others)


class ConfigurationError(Exception):
    """The settings cannot be used; the text has one line for each thing that is wrong."""
