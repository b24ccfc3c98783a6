"""`python -m reference.conformance.wheel FOLDER`: the kit as a distribution that needs NumPy alone.

A wheel is a ZIP file. This one has the kit and the modules of `reference/` that the kit imports.
"""

import hashlib
import sys
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from reference.conformance import __version__

KIT = Path(__file__).parent
ROOT = KIT.parents[1]
NAME = f"preference_conformance-{__version__}"
BESIDE = ("__init__", "objectives", "weights", "simplex")
"""The modules of `reference/` that the kit needs."""
DATA = (".md", ".js", ".json")
METADATA = f"""Metadata-Version: 2.1
Name: preference-conformance
Version: {__version__}
Summary: Does a DPO, IPO, distillation or reward-model loss compute what its name says?
License: Apache-2.0
Requires-Python: >=3.11
Requires-Dist: numpy>=2.0
Description-Content-Type: text/markdown

"""
WHEEL = "Wheel-Version: 1.0\nGenerator: minipref\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
ENTRY_POINTS = """[console_scripts]
preference-conformance = reference.conformance.__main__:main

[pytest11]
preference-conformance = reference.conformance.plugin
"""


def build(folder: Path) -> Path:
    """Write the wheel.

    Args:
        folder: where to; it has to exist.

    Returns:
        The wheel's path. Its bytes depend on the tree alone.

    Raises:
        OSError: it cannot be written.
    """
    path, lines = folder / f"{NAME}-py3-none-any.whl", []
    with ZipFile(path, "w", ZIP_DEFLATED) as wheel:
        for name, content in _files():
            wheel.writestr(ZipInfo(name), content, ZIP_DEFLATED)
            digest = urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            lines.append(f"{name},sha256={digest},{len(content)}")
        lines.append(f"{NAME}.dist-info/RECORD,,")
        wheel.writestr(ZipInfo(f"{NAME}.dist-info/RECORD"), "\n".join(lines) + "\n", ZIP_DEFLATED)
    return path


def _files() -> Iterator[tuple[str, bytes]]:
    """Names in the wheel, and contents."""
    kit = [path for path in KIT.rglob("*") if path.suffix in (".py", *DATA)]
    for path in [*(KIT.parent / f"{name}.py" for name in BESIDE), *sorted(kit)]:
        yield str(path.relative_to(ROOT)), path.read_bytes()
    about = METADATA + (KIT / "README.md").read_text(encoding="utf-8")
    texts = {"METADATA": about, "WHEEL": WHEEL, "entry_points.txt": ENTRY_POINTS}
    for name, text in texts.items():
        yield f"{NAME}.dist-info/{name}", text.encode()


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
