import sys
import warnings

import pytest

from scale.data.docstrings import docstrings

MODULE = '''"""Tools for the measured handling of boxes.

The tools in this module open, fill and close boxes of every size, and keep a careful count of
whatever was put into each of them.
"""
raise RuntimeError("a corpus must never import what it reads")


class Box:
    """A container with a lid that stays closed.

    The lid is held by its own weight, see :class:`~boxes.Lid` and ``open``; it can be lifted by
    at most *one* hand [1]_ and falls back into place as soon as it is let go.

    .. versionadded:: 1.0

        >>> Box().open()

    Parameters
    ----------
    size : int
        Never part of a prompt when the prose before it is long enough.
    """

    def fill(self, count, kind):
        """Put things into
        the box.

        Parameters
        ----------
        count : int
            How many things to put into the box, counted before any of them
            is put into it.
        kind : str
            What the things are called by the people who made them.

        Returns
        -------
        int
            Never this.
        """

    async def google(self, count):
        """Empty the whole box onto a table.

        Args:
          count: How many things to take out of the box, counted after all of
            them were taken.
          kind (str): What the things are called by those who took them.

        Returns:
          Never this.
        """

    def sphinx(self):
        """Weigh the box without its lid.

        The lid is taken off first and put back as soon as the number on the scale has stopped
        moving.

        :param unit: never this
        """
'''

LEFT_OUT = '''
def short():
    """Take the lid away.

    Too short a body.
    """


def two_sentences():
    """Take the lid away. Then put it back again.

    The body of this one is long enough to be a prompt and is left out for the two sentences above
    it.
    """


def quoted():
    """Take the lid away.

    Whoever calls this function wants to take the lid away and to leave the rest of the box where it
    stands.
    """


def signature():
    """signature(box, lid) -> box without lid

    The body of this one is long enough to be a prompt and is left out for the signature that stands
    above it.
    """


def no_body():
    """Take the lid away."""


def code():
    """Take the lid away.

    Example usage

        for box in boxes: box.lid.take(away=True, then="put", it=back) or box.lid.leave(where=it,
        stands=now)
        and so on and so forth in an indented block that is no running text at all for a reader
    """
'''

TWIN = '''
def twin():
    """Weigh the box but not the lid.

    The lid is taken off FIRST and put back as soon as the number on the scale has stopped   moving.
    """


def longer():
    """Say one word many times over.

    LONG
    """
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Imported as `corpusboxes`; its modules fail when run."""
    folder = tmp_path / "corpusboxes"
    files = {
        "__init__.py": "",
        "_private.py": MODULE,
        "left_out.py": LEFT_OUT,
        "zz.py": TWIN,
        "tests/test_it.py": MODULE.replace("box", "chest"),
        "broken.py": 'def f(:\n    """Not Python in any version."""',
        "warned.py": 'x = "\\d"\ny = 1 is 1\n',
        "latin.py": b"# coding: utf-8\n\xff\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.syspath_prepend(tmp_path)
    return "corpusboxes"


def test_bodies_and_summaries_of_a_package(package):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = {row["source"]: (row["prompt"], row["completion"]) for row in docstrings((package,))}
    assert not caught
    assert rows == {
        "corpusboxes": (
            "The tools in this module open, fill and close boxes of every size, and keep a careful "
            "count of whatever was put into each of them.",
            "Tools for the measured handling of boxes",
        ),
        "corpusboxes.Box": (
            "The lid is held by its own weight, see boxes.Lid and open; it can be lifted by at "
            "most one hand and falls back into place as soon as it is let go.",
            "A container with a lid that stays closed",
        ),
        "corpusboxes.Box.fill": (
            "How many things to put into the box, counted before any of them is put into it. What "
            "the things are called by the people who made them.",
            "Put things into the box",
        ),
        "corpusboxes.Box.google": (
            "How many things to take out of the box, counted after all of them were taken. What "
            "the things are called by those who took them.",
            "Empty the whole box onto a table",
        ),
        "corpusboxes.Box.sphinx": (
            "The lid is taken off first and put back as soon as the number on the scale has "
            "stopped moving.",
            "Weigh the box without its lid",
        ),
    }


def test_a_body_is_cut_at_sixty_words(package, tmp_path):
    words = [f"word{'abcdefghij'[i // 10]}{'abcdefghij'[i % 10]}" for i in range(100)]
    (tmp_path / package / "zz.py").write_text(TWIN.replace("LONG", " ".join(words)))
    rows = {row["source"]: row["prompt"] for row in docstrings((package,))}
    assert rows["corpusboxes.zz.longer"] == " ".join(words[:60])


def test_what_is_not_installed_gives_no_rows(package):
    assert docstrings(("surely_not_installed_anywhere",)) == []
    assert docstrings(("surely_not_installed_anywhere", package)) == docstrings((package,))


def test_a_package_is_read_and_not_imported(package):
    docstrings((package,))
    assert not any(name.startswith(package) for name in sys.modules)


def test_the_standard_library():
    rows = docstrings(("json", "textwrap"))
    assert rows == docstrings(("textwrap", "json"))
    assert {row["source"].split(".")[0] for row in rows} == {"json", "textwrap"}
    prompts = [row["prompt"] for row in rows]
    assert len({prompt.casefold() for prompt in prompts}) == len(prompts) > 5
    assert all(15 <= len(prompt.split()) <= 60 for prompt in prompts)
    assert all(3 <= len(row["completion"].split()) <= 20 for row in rows)
    assert all(row["completion"].casefold() not in row["prompt"].casefold() for row in rows)
