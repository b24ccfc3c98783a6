"""The embedded corpus: docstrings of the installed code, as TL;DRs that people wrote.

A row's prompt is a docstring's description, its completion is the summary line. Sources are parsed
and never imported, and nothing of them is kept with this project. The rows are a function of the
Python environment: to repeat a run elsewhere, install the same package versions.
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

# which files are read
PACKAGES = (
    *sorted(sys.stdlib_module_names),
    *("numpy", "scipy", "jax", "optax", "equinox", "jaxtyping"),
    *("matplotlib", "pyarrow", "rich", "tyro"),
)
SKIPPED = frozenset(
    {"test", "tests", "testing", "idlelib", "lib2to3", "_vendor", "site-packages", "conftest"}
)

# what a row may be: the fewest and the most words, and the marks of a summary that is none
PROMPT_WORDS = (15, 60)
SUMMARY_WORDS = (3, 20)
NO_SUMMARY = re.compile(r"[.!?:;] |->|>>>|[:(,]$|^\w+\(|\.\w+ -|Copyright")

# the parts of a docstring, in the styles of Google, NumPy and Sphinx
PARAMETERS = r"(?:Args|Arguments|Attributes|Parameters)"
SECTION = rf"(?:{PARAMETERS}|Returns?|Raises|Yields|References?|Notes?|Examples?)::?\n"
HEADING = re.compile(rf"^(?:\w[\w ]*\n[-=~]{{3,}}(?:\n|$)|{SECTION})", re.MULTILINE)
SPHINX_FIELD = re.compile(r":(param|parameter|arg|return|raise|type|rtype|keyword)")
GOOGLE_ENTRY = re.compile(r"\*{0,2}\w+(?: \([^)]*\))?: (.+)")
NOISE = re.compile(r">>>|\.\. |[|+=#@$*-]|\d+\.|\[\d|In \[|\w+ ?=[^=]")

MARKUP = (  # in this order: Sphinx roles, links, code, footnotes and emphasis, a last colon
    (re.compile(r":[\w:+.-]+:`~?([^`<]*?)\s*(?:<[^`>]*>)?`"), r"\1"),
    (re.compile(r"\[([^]]+)\]\([^)]*\)"), r"\1"),
    (re.compile(r"`+~?([^`<]*?)\s*(?:<[^`>]*>)?`+_*"), r"\1"),
    (re.compile(r"\s*\[\d+\]_?|(?<!\w)\*{1,2}(?=\w)|(?<=\w)\*{1,2}(?!\w)"), ""),
    (re.compile(r"::?$"), ":"),
)


def docstrings(packages: tuple[str, ...] = PACKAGES) -> list[dict[str, str]]:
    """Rows of the docstrings of the installed packages.

    Args:
        packages: Names of top-level packages and modules; those that are not installed are skipped.

    Returns:
        Rows `{prompt, completion, source}`, sorted by `source`, a dotted name. `completion` is the
        summary, one sentence without its full stop. `prompt` is the description after it, cut at 60
        words; where that is short, the descriptions of the parameters follow. No two prompts are
        equal, and no prompt contains its summary.
    """
    rows: dict[str, dict[str, str]] = {}
    for source, text in sorted(entry for name in packages for entry in _package(name)):
        pair = _pair(text)
        if pair is not None:
            row = {"prompt": pair[0], "completion": pair[1], "source": source}
            rows.setdefault(pair[0].casefold(), row)
    return sorted(rows.values(), key=lambda row: (row["source"], row["prompt"]))


def _package(name: str) -> Iterator[tuple[str, str]]:
    """The dotted name and the docstring of everything in a package; names omit private modules."""
    root = None if name in SKIPPED else _root(name)
    files = [] if root is None else [root] if root.is_file() else sorted(root.rglob("*.py"))
    for file in files:
        parts = () if root is None or root == file else file.relative_to(root).with_suffix("").parts
        if SKIPPED.isdisjoint(parts):
            public = [part for part in parts if part[0] != "_"]
            yield from _documented(".".join([name, *public]), _parse(file))


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
    """A docstring's (prompt, summary); None where either is unfit."""
    first, _, rest = text.partition("\n\n")
    summary = _plain(first).rstrip(".")
    body = _body(rest).split()[: PROMPT_WORDS[1]]
    if not _is_summary(summary) or len(body) < PROMPT_WORDS[0]:
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
    if len(prose.split()) >= PROMPT_WORDS[0]:
        return prose
    described = [
        _descriptions(section) for section in sections[1:] if re.match(rf"{PARAMETERS}\b", section)
    ]
    return " ".join([prose, *described]).strip()


def _sections(text: str) -> list[str]:
    """A body, cut before each of its headings."""
    bounds = [0, *(match.start() for match in HEADING.finditer(text)), len(text)]
    return [text[start:end] for start, end in pairwise(bounds)]


def _prose(section: str) -> str:
    """The paragraphs that are running text, up to the first list of fields."""
    paragraphs = re.split(r"\n\s*\n", section.strip("\n"))
    before_fields = takewhile(lambda p: not SPHINX_FIELD.match(p.lstrip()), paragraphs)
    plain = [_plain(p) for p in before_fields if p[:1].strip() and not NOISE.match(p)]
    return " ".join(p for p in plain if _is_prose(p))


def _descriptions(section: str) -> str:
    """The text of a NumPy- or Google-style section, without the parameters' names and types."""
    lines = section.split("\n")[1:]
    margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    texts = (_description(line[margin:]) for line in lines)
    fit = (text for text in texts if text and "\\" not in text and not NOISE.match(text))
    return _plain(" ".join(fit))


def _description(line: str) -> str:
    if line[:1].isspace():
        return line.strip()
    entry = GOOGLE_ENTRY.match(line)
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
    mostly_letters = sum(map(str.isalpha, visible)) > 0.85 * len(visible)
    return mostly_letters and "\\" not in text and ">>>" not in text
