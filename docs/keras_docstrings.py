"""Docstrings in Keras's form, as mkdocstrings can read them.

It takes "Example:" and "Reference:" for titles of an indented text, `>>>` and
`>= 0` at the start of a line for quotations, and the fields of a `NamedTuple`
for no arguments.
"""

import re
from typing import Any

import griffe

TITLE = re.compile(r"^(Example|Reference):$", re.M)
GREATER = re.compile(r"^(\s*)>(?=[= ])", re.M)
SESSION = re.compile(r"^>>> .*(?:\n.+)*", re.M)


def readable(docstring: str) -> str:
    docstring = TITLE.sub(r"**\1**", docstring)
    docstring = GREATER.sub(r"\1\>", docstring)
    return SESSION.sub(r"```pycon\n\g<0>\n```", docstring)


class KerasDocstrings(griffe.Extension):
    """Changes each docstring, and the signature, when it has been read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        for parameter in getattr(obj, "parameters", ()):
            if parameter.kind is griffe.ParameterKind.var_keyword:
                parameter.default = None  # It is no `{}`.
        if obj.docstring is None:
            return
        value = readable(obj.docstring.value)
        if obj.is_class and "NamedTuple" in map(str, obj.bases):
            value = value.replace("Args:", "Attributes:")
        obj.docstring.value = value
