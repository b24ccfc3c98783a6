"""The embedded corpus: docstrings of the installed code, body -> summary line, TL;DRs that people wrote.

Sources are found and parsed, never imported; nothing of them is kept with this project. The rows are a
function of the Python environment: a run that is to be repeated elsewhere needs the same package versions.
"""

import ast
import re
import sys
import tokenize
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise, takewhile
from pathlib import Path
from sysconfig import get_path

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


PACKAGES = (
    *sorted(sys.stdlib_module_names),
    *("numpy", "scipy", "jax", "optax", "equinox", "matplotlib", "pyarrow", "rich", "tyro", "jaxtyping"),
)


SKIPPED = {"test", "tests", "testing", "idlelib", "lib2to3", "_vendor", "site-packages", "conftest"}


BODY_WORDS = (15, 60)


SUMMARY_WORDS = (3, 20)


NO_SUMMARY = re.compile(r"[.!?:;] |->|>>>|[:(,]$|^\w+\(|\.\w+ -|Copyright")


SECTION = r"(?:Args|Arguments|Attributes|Parameters|Returns?|Raises|Yields|References?|Notes?|Examples?)::?\n"


HEADING = re.compile(rf"^(?:\w[\w ]*\n[-=~]{{3,}}(?:\n|$)|{SECTION})", re.MULTILINE)


DESCRIBED = re.compile(r"(Args|Arguments|Attributes|Parameters)\b")


FIELD = re.compile(r":(param|parameter|arg|return|raise|type|rtype|keyword)")


ENTRY = re.compile(r"\*{0,2}\w+(?: \([^)]*\))?: (.+)")


NOISE = re.compile(r">>>|\.\. |[|+=#@$*-]|\d+\.|\[\d|In \[|\w+ ?=[^=]")


MARKUP = (
    (re.compile(r":[\w:+.-]+:`~?([^`<]*?)\s*(?:<[^`>]*>)?`"), r"\1"),
    (re.compile(r"\[([^]]+)\]\([^)]*\)"), r"\1"),
    (re.compile(r"`+~?([^`<]*?)\s*(?:<[^`>]*>)?`+_*"), r"\1"),
    (re.compile(r"\s*\[\d+\]_?|(?<!\w)\*{1,2}(?=\w)|(?<=\w)\*{1,2}(?!\w)"), ""),
    (re.compile(r"::?$"), ":"),
)


def docstrings(packages: tuple[str, ...] = PACKAGES) -> list[dict[str, str]]:
    """Rows `{prompt, completion, source}` of the packages that are installed, sorted, no two of one prompt.

    `completion` is the summary, one sentence without its full stop; `prompt` is the description after it, cut
    at 60 words (a TL;DR prompt of the miniature is short). Where little prose stands between the summary and
    the first section, the parameters' descriptions follow it. Prompts containing their summary are left out.
    """
    rows: dict[str, dict[str, str]] = {}
    for source, text in sorted(found for name in packages for found in _package(name)):
        pair = _pair(text)
        if pair is not None:
            row = {"prompt": pair[0], "completion": pair[1], "source": source}
            rows.setdefault(pair[0].casefold(), row)
    return sorted(rows.values(), key=lambda row: (row["source"], row["prompt"]))


def _package(name: str) -> Iterator[tuple[str, str]]:
    """Every docstring of a package with its dotted name, private modules left out of the name."""
    root = None if name in SKIPPED else _root(name)
    files = [] if root is None else [root] if root.is_file() else sorted(root.rglob("*.py"))
    for file in files:
        parts = () if root is None or root == file else file.relative_to(root).with_suffix("").parts
        if SKIPPED.isdisjoint(parts):
            yield from _documented(".".join([name, *(p for p in parts if p[0] != "_")]), _parse(file))


def _root(name: str) -> Path | None:
    """A top-level package's folder or a module's file; None where there is no Python source."""
    spec = find_spec(name)
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    frozen = Path(get_path("stdlib"), f"{name}.py")
    file = frozen if spec.origin == "frozen" else Path(spec.origin or "")
    return file if file.suffix == ".py" and file.is_file() else None


def _parse(file: Path) -> ast.Module:
    """A file's syntax tree, empty where it is not valid Python of this version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with tokenize.open(file) as stream:
                return ast.parse(stream.read())
        except (SyntaxError, ValueError):
            return ast.Module(body=[], type_ignores=[])


def _documented(name: str, node: Documented) -> Iterator[tuple[str, str]]:
    text = ast.get_docstring(node)
    if text:
        yield name, text
    for child in node.body:
        if isinstance(child, Documented):
            yield from _documented(f"{name}.{child.name}", child)


def _pair(text: str) -> tuple[str, str] | None:
    """A docstring's (body, summary), None where either is not what it should be."""
    first, _, rest = text.partition("\n\n")
    summary = _plain(first).rstrip(".")
    body = _body(rest).split()[: BODY_WORDS[1]]
    if not _is_summary(summary) or len(body) < BODY_WORDS[0]:
        return None
    prompt = " ".join(body)
    return None if summary.casefold() in prompt.casefold() else (prompt, summary)


def _is_summary(text: str) -> bool:
    fits = SUMMARY_WORDS[0] <= len(text.split()) <= SUMMARY_WORDS[1]
    return fits and _is_prose(text) and not NO_SUMMARY.search(text)


def _body(text: str) -> str:
    """The prose before the first section, or the parameters' descriptions where it is too short."""
    sections = _sections(text)
    prose = _prose(sections[0])
    if len(prose.split()) >= BODY_WORDS[0]:
        return prose
    described = [_descriptions(section) for section in sections[1:] if DESCRIBED.match(section)]
    return " ".join([prose, *described]).strip()


def _sections(text: str) -> list[str]:
    """A body cut before each of its headings; what precedes the first is the first."""
    bounds = [0, *(match.start() for match in HEADING.finditer(text)), len(text)]
    return [text[start:end] for start, end in pairwise(bounds)]


def _prose(section: str) -> str:
    """The paragraphs that are running text, up to the first list of fields."""
    paragraphs = takewhile(lambda p: not FIELD.match(p.lstrip()), re.split(r"\n\s*\n", section.strip("\n")))
    plain = [_plain(p) for p in paragraphs if p[:1].strip() and not NOISE.match(p)]
    return " ".join(p for p in plain if _is_prose(p))


def _descriptions(section: str) -> str:
    """What a NumPy- or Google-style section says of its parameters, without their names and types."""
    lines = section.split("\n")[1:]
    margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    found = (_description(line[margin:]) for line in lines)
    return _plain(" ".join(line for line in found if line and "\\" not in line and not NOISE.match(line)))


def _description(line: str) -> str:
    if line[:1].isspace():
        return line.strip()
    entry = ENTRY.match(line)
    return entry[1] if entry else ""


def _plain(text: str) -> str:
    """One line without markup."""
    text = " ".join(text.split())
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement, text)
    return text.strip()


def _is_prose(text: str) -> bool:
    """Mostly letters, and neither TeX nor a doctest."""
    visible = [letter for letter in text if not letter.isspace()]
    return sum(map(str.isalpha, visible)) > 0.85 * len(visible) and "\\" not in text and ">>>" not in text
