"""The one exception for mistakes that a user can mend, and how to tell a lack of memory from other errors."""

import errno

import torch

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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that there was not enough memory, of a GPU or of the machine."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # The CPU's allocator (on Windows: "not enough memory"), C++, MPS and the CUDA libraries raise a RuntimeError.
    words = ("can't allocate memory", "Cannot allocate memory", "not enough memory", "out of memory", "_ALLOC_FAILED",
             "bad_alloc", "Invalid buffer size")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
