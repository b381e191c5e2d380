"""For the documentation's build: reads what Google's and Sphinx's conventions mean and mkdocstrings doesn't.

``Example:`` is taken for a note, in which doctests are quotations, and ``::`` before an indented block is shown.
"""

import re

import griffe


class Docstrings(griffe.Extension):
    """``Example:`` becomes ``Examples:``, and ``::`` a colon."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """After a module, class, function or attribute was read."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
            obj.docstring.value = re.sub(r"::$", ":", text, flags=re.M)
