"""Commands out of functions: a configuration among a function's parameters becomes an option for each of its settings.

    def pack(config: PackConfig) -> None:
        \"\"\"Pack images into one .beton file.\"\"\"

    app.command("pack")(command(pack))

A parameter of the type ``partial[CacheConfig]`` is what the options say of a configuration that the function completes. A
parameter with a setting is an option of its own.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING
from functools import partial
from typing import Annotated, Any, get_args, get_origin

import typer

from .errors import FailureError, MisuseError
from .settings import Described, described, given_fields, is_configuration, setting_of, words_of

SPELLING: dict[str, str] = {}
"""Field or parameter -> option, of every command that has been made."""


def command(function: Callable[..., None], **bound: Any) -> Callable[..., None]:
    """``function`` for typer. ``bound`` are arguments that no option gives, such as what another stage does."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in bound]
    options = {option.name: option for parameter in parameters for option in _options(parameter)}

    def run(**values: Any) -> None:
        try:
            arguments = {parameter.name: _argument(parameter, values) for parameter in parameters}
            function(**arguments, **bound)
        except (MisuseError, FailureError) as error:
            raise type(error)(spelled(str(error))) from error

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__annotations__ = {name: option.annotation for name, option in options.items()}
    run.__signature__ = inspect.Signature([*options.values()])  # type: ignore[attr-defined]
    return run


def spelled(text: str) -> str:
    """The library's `` `jpeg_quality` `` as the command line has it: ``--jpeg-quality``."""
    return re.sub("`([a-z0-9_]+)`", lambda match: SPELLING.get(match[1], match[0]), text)


def given(context: typer.Context) -> set[str]:
    """Names of the parameters that the command line gives."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def refuse(context: typer.Context, names: Iterable[str], reason: str) -> None:
    """MisuseError naming the first of these settings that the command line gives."""
    present = given(context)
    for name in names:
        if name in present:
            raise MisuseError(f"`{name}` {reason}: leave `{name}` out")


def _options(parameter: inspect.Parameter) -> Iterator[inspect.Parameter]:
    """What typer sees of a parameter."""
    config = _configuration(parameter.annotation)
    kind, setting = setting_of(parameter.annotation)
    if config is not None:
        yield from map(_option, described(config, instead=words_of(parameter.annotation)))
    elif setting is not None:
        default = MISSING if parameter.default is parameter.empty else parameter.default
        yield _option(Described(parameter.name, parameter.name, kind, setting, default))
    else:  # typer's own, such as its Context
        yield parameter.replace(kind=parameter.KEYWORD_ONLY)


def _option(what: Described) -> inspect.Parameter:
    kind, default, setting = what.kind, what.default, what.setting
    if get_origin(kind) is tuple and get_args(kind)[-1] is ...:  # given several times; then in the default's place
        kind, default = list[get_args(kind)[0]] | None, None  # type: ignore[misc]
    if setting.argument is not None:
        info = typer.Argument(metavar=setting.argument, help=setting.help, min=setting.low, max=setting.high)
        SPELLING.setdefault(what.field, setting.argument)
    else:
        names = [setting.option] if setting.option else []
        info = typer.Option(*names, help=setting.help, min=setting.low, max=setting.high)
        SPELLING[what.field] = SPELLING[what.name] = "--" + what.name.replace("_", "-")
    empty = inspect.Parameter.empty if default is MISSING else default
    return inspect.Parameter(what.name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, info], default=empty)


def _configuration(annotation: Any) -> type | None:
    """``PackConfig`` of ``PackConfig`` and of ``partial[PackConfig]``; None: it is another type."""
    kind, _ = setting_of(annotation)
    kind = get_args(kind)[0] if get_origin(kind) is partial else kind
    return kind if is_configuration(kind) else None


def _argument(parameter: inspect.Parameter, values: dict[str, Any]) -> Any:
    annotation = parameter.annotation
    config = _configuration(annotation)
    if config is None:
        value = values[parameter.name]
        if value is None and parameter.default is not parameter.empty:
            return parameter.default
        return tuple(value) if isinstance(value, list) else value
    known = partial(config, **given_fields(config, values, instead=words_of(annotation)))
    return known if get_origin(setting_of(annotation)[0]) is partial else known()
