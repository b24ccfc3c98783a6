"""A stage as the command that runs it."""

import shlex
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, get_type_hints


def command_line(stage: Any) -> str:
    """The command with the options that are not defaults."""
    words = ["python", "-m", "scale.run", type(stage).__name__.lower(), *arguments(stage)]
    return shlex.join(words)


def arguments(options: Any, defaults: Any = None, prefix: str = "--") -> Iterator[str]:
    """The words of all options that differ from their defaults; nested ones as `--a.b`.

    Args:
        options: A dataclass.
        defaults: The one whose values need no words. Default: the class's own defaults.
        prefix: What stands before a name.
    """
    hints = get_type_hints(type(options), include_extras=True)
    for field in fields(options):
        value = getattr(options, field.name)
        default = default_of(field) if defaults is None else getattr(defaults, field.name)
        if value == default:
            continue
        names = [getattr(m, "name", None) for m in getattr(hints[field.name], "__metadata__", ())]
        name = next(filter(None, names), field.name).replace("_", "-")
        if is_dataclass(value):
            yield from arguments(value, default, f"{prefix}{name}.")
        elif isinstance(value, bool):
            yield f"{prefix}{name}" if value else f"{prefix}no-{name}"
        else:
            yield f"{prefix}{name}"
            yield from map(str, value if isinstance(value, tuple) else (value,))


def default_of(field: Field) -> Any:
    """The default of an option; MISSING where it must be named."""
    return field.default if field.default_factory is MISSING else field.default_factory()
