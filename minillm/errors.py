"""The one exception for mistakes that a user can mend."""

LONGEST = 500  # characters of a message


class UserError(Exception):
    """One line that says what is wrong, where, and what to do; scripts print it without a traceback.

    It may quote a file that somebody else made: line breaks and control characters become spaces, and the middle of
    what is too long is left out.
    """

    def __str__(self):
        text = super().__str__()
        if len(text) > LONGEST:
            text = f"{text[:LONGEST - 200]} ... {text[-180:]}"
        return printable(text)


def printable(text: str) -> str:
    """Text from a file in one line: what could break it, or command a terminal, becomes a space."""
    return "".join(character if character.isprintable() else " " for character in text)
