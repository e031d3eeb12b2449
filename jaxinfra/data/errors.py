"""The error that data code raises for what a user can put right."""


class DataError(ValueError):
    """A bad file, option or data set: the message says what, the rule and the fix."""
