"""For the API pages of scripts/docs_pages.py: signatures as Python shows them, and names of docstrings as links."""

import re
from importlib import import_module
from inspect import Parameter, formatannotation, signature
from typing import Any

import griffe

# Where a class is defined; a reader takes it from the package.
MODULES = re.compile(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])")
# An example that a test runs, with what it prints.
EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", flags=re.MULTILINE)
# :func:`resize`, :class:`~dynrank.schedules.Stage`
ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`~?([^`]+)`")


class ReadableNames(griffe.Extension):
    """Take the annotations of a checked call from Python, which has them without their constraints."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Replace ``Count`` by ``int``, and so on."""
        plain = _plain(func.module.path, func.name) if func.parent is func.module else {}
        for parameter in func.parameters:
            if parameter.name in plain:
                parameter.annotation = _shown(plain[parameter.name])
        _without_roles(func)

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Give a class that is checked its constructor's arguments; of a dataclass they stand nowhere else."""
        plain = _plain(cls.module.path, cls.name) if cls.parent is cls.module else {}
        if plain and "__init__" not in cls.members:
            arguments = [
                griffe.Parameter(
                    name,
                    annotation=_shown(argument),
                    kind=griffe.ParameterKind[argument.kind.name.lower()],
                    default=None if argument.default is Parameter.empty else repr(argument.default),
                )
                for name, argument in plain.items()
            ]
            itself = griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)
            cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(itself, *arguments)))
        _without_roles(cls)


def _plain(module: str, name: str) -> dict[str, Parameter]:
    """The parameters of what is checked by pydantic (dynrank/errors.py); {}: of anything else."""
    # These import programs that are not installed here, and are on no page.
    if module.startswith("dynrank.integrations"):
        return {}
    made = getattr(import_module(module), name, None)
    if "__signature__" not in vars(made or object):
        return {}
    return dict(signature(made).parameters)


def _shown(parameter: Parameter) -> str:
    # A type variable is shown as ~M.
    return MODULES.sub("", formatannotation(parameter.annotation)).replace("~", "")


def _without_roles(made: griffe.Object) -> None:
    if made.docstring:
        text = ROLE.sub(r"`\1`", made.docstring.value)
        made.docstring.value = EXAMPLE.sub(r"```pycon\n\g<0>\n```\n", text)
