"""The one exception for mistakes that a user can mend."""


class UserError(Exception):
    """One line that says what is wrong, where, and what to do; scripts print it without a traceback."""
