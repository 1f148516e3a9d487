"""The base of all errors that are the user's to mend."""


class UserError(Exception):
    """Something that the user can put right, said in one line: what was wrong, what was expected.

    Commands and stages print it without a traceback; anything else is a bug and keeps its own.
    """
