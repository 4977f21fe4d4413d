"""Text that every Python installation carries: docstrings to pretrain on, topics to fine-tune on.

The two do not overlap: docstrings describe library modules, topics are chapters of the language
reference (what ``help("for")`` shows).
"""

import ast
import sysconfig
from pathlib import Path

from fedsplit.errors import FedsplitError

_NOT_LIBRARY = {"test", "tests", "idle_test", "lib2to3", "pydoc_data", "site-packages"}

THEMES = {
    "statements": ("compound", "assignment", "import", "raise", "global", "assert"),
    "data model": ("specialnames", "objects", "execmodel"),
    "text": ("formatstrings", "string-methods", "strings", "identifiers"),
    "types": ("types", "typesmapping", "typesseq", "dict", "typesmethods"),
}
"""Groups of topics that differ in subject and wording, by name; each is one device's natural data.

No topic here contains another one's text, except in passing.
"""


def docstrings() -> list[str]:
    """Return the docstrings of the standard library, one text per module, in path order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py")):
        if _NOT_LIBRARY.isdisjoint(path.relative_to(root).parts):
            found = _docstrings_of(path)
            if found:
                texts.append("\n\n".join(found))
    return texts


def _docstrings_of(path: Path) -> list[str]:
    """Return the docstrings in a source file; a file that is no valid Python has none."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return [text for text in found if text]


def topic_texts() -> dict[str, list[str]]:
    """Return the texts of each theme's topics, as far as this Python has them.

    Raises
    ------
    FedsplitError
        If this Python was installed without its documentation topics.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise FedsplitError(
            "data.source='stdlib': this Python lacks the module pydoc_data.topics; "
            "use another source, such as data=text path=FOLDER"
        ) from error
    return {
        theme: [topics[name] for name in names if name in topics] for theme, names in THEMES.items()
    }
