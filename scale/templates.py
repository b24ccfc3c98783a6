"""Templates of reports: Jinja files, in which a missing value is an error."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from scale.files import write_text


def load_template(path: Path, **filters: Callable[..., Any]) -> Template:
    """The template of a file, with filters besides Jinja's own."""
    environment = Environment(
        loader=FileSystemLoader(path.parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cut": cut, "escape": escape} | filters
    return environment.get_template(path.name)


def write_rendered(path: Path, template: Template, context: dict[str, Any]) -> None:
    """Write what a template makes of a context; lines that it leaves empty become one."""
    text = re.sub(r"\n{3,}", "\n\n", template.render(context))
    write_text(path, text.strip() + "\n")


def cut(text: str, length: int = 300) -> str:
    return text if len(text) <= length else text[:length].rsplit(" ", 1)[0] + " ..."


def escape(text: str) -> str:
    """One line that Markdown shows as it is; control characters are replaced."""
    line = re.sub(r"[\x00-\x1f\x7f-\x9f]", "\ufffd", " ".join(text.split()))
    return re.sub(r"([\\`*_\[\]<>|#~$&])", r"\\\1", line)
