"""The error for what a user gave: a file, a field, an option."""


def option_name(field: str) -> str:
    """The option of a field: `--learning-rate` of `learning_rate`."""
    return f"--{field.replace('_', '-')}"


class InputError(ValueError):
    """A message that names the place: `FILE:LINE: field 'F': ...`, `FILE: row 3: ...`, `--option`.

    Lines and rows count from 1. The command line prints the message alone, without a traceback.
    """
