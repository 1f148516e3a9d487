"""A user's module that cannot be imported, of an error that no import has of itself."""

weight = weights  # noqa: F821
