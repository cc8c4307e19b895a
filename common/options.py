"""Commands out of functions: a configuration among a function's parameters becomes an option for each of its settings.

    def pack(config: PackConfig) -> None:
        \"\"\"Pack images into one .beton file.\"\"\"

    app.command("pack")(command(pack))

A parameter of the type ``partial[CacheConfig]`` is what the options say of a configuration that the function completes. A
parameter with a setting is an option of its own.
"""

import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperOption

from .errors import FailureError, MisuseError
from .settings import Described, check_value, described, given_fields, is_configuration, setting_of, words_of

SPELLING: dict[str, str] = {}
"""Field or parameter -> option, of every command that has been made."""


def command(function: Callable[..., None], **bound: Any) -> Callable[..., None]:
    """``function`` for typer. ``bound`` are arguments that no option gives, such as what another stage does."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in bound]
    options = {option.name: option for parameter in parameters for option in _options(parameter)}
    metavars = {name: info.metavar for name, option in options.items() if (info := _argument_info(option)) is not None}

    def run(**values: Any) -> None:
        values = {name: at_home(value) for name, value in values.items()}
        try:
            arguments = {parameter.name: _argument(parameter, values) for parameter in parameters}
            function(**arguments, **bound)
        except (MisuseError, FailureError) as error:
            raise type(error)(spelled(str(error), metavars)) from error

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__annotations__ = {name: option.annotation for name, option in options.items()}
    run.__signature__ = inspect.Signature([*options.values()])  # type: ignore[attr-defined]
    return run


MANY = 16
"""Options of a command that are listed by groups."""
GROUPS = {
    "Train": "Run",
    "Pairing": "Which views meet",
    "RecipeOverrides": "Views",
    "Loader": "Loading",
    "TargetOptions": "Targets",
    "": "Options",
}
"""What a group is called, where that is not the name of its configuration."""
LAST = ("Without a teacher", "Other")
"""Groups that come behind all others."""


def group_of(owner: str) -> str:
    """``ObjectiveConfig`` -> Objective."""
    name = owner.removesuffix("Config").removesuffix("Choice")
    return GROUPS.get(name, name)


class GroupedCommand(TyperCommand):
    """A command whose many options are listed by what they are of, and whose pairs and threes of numbers may have commas:
    ``0.5,1``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        several = {name: p.nargs for p in self.params if p.nargs in (2, 3) for name in p.opts}
        for name, count in self._repeated(args):
            typer.echo(f"{name} is there {count} times: the last one counts")
        words: list[str] = []
        for word in args:
            name, equals, value = word.partition("=")
            if equals and name in several and "," in value:
                words += [name, *value.split(",", several[name] - 1)]
            elif words and words[-1] in several and "," in word:
                words += [part.strip() for part in word.split(",", several[words[-1]] - 1)]
            else:
                words.append(word)
        for place, name in enumerate(words):
            values = words[place + 1 : place + 1 + several.get(name, 0)]
            if name in several and (len(values) < several[name] or any(value.startswith("--") for value in values)):
                example = "0.5,1" if several[name] == 2 else "0.5,0.5,0.5"
                raise MisuseError(f"{name} takes {several[name]} numbers: {name} {example}")
        return super().parse_args(ctx, words)

    def _repeated(self, args: list[str]) -> Iterator[tuple[str, int]]:
        """Options of one value that are there more than once: easily meant to be added up, as some are."""
        options = args[: args.index("--")] if "--" in args else args
        for parameter in self.params:
            if isinstance(parameter, TyperOption) and not parameter.multiple and not parameter.is_flag:
                count = sum(word.partition("=")[0] in parameter.opts for word in options)
                if count > 1:
                    yield parameter.opts[0], count

    def format_options(self, ctx: Any, formatter: Any) -> None:
        options = [p for p in self.get_params(ctx) if isinstance(p, TyperOption)]
        if len(options) < MANY:
            return super().format_options(ctx, formatter)
        arguments = [p for p in self.get_params(ctx) if not isinstance(p, TyperOption)]
        groups: dict[str, list[Any]] = {"Arguments": arguments}
        for option in options:
            title = "Other" if option.name in ("overwrite", "help") else option.rich_help_panel or GROUPS[""]
            groups.setdefault(title, []).append(option)
        for title, members in sorted(groups.items(), key=lambda group: group[0] in LAST):
            records = [record for member in members if (record := member.get_help_record(ctx)) is not None]
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def at_home(value: Any) -> Any:
    """``~/data`` as the shell would have it, which leaves ``--out=~/data`` as it is: else a folder named ~ would be made."""
    if isinstance(value, list):
        return [at_home(each) for each in value]
    if isinstance(value, Path):
        return value.expanduser()
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def spelled(text: str, arguments: Mapping[str, str | None] = MappingProxyType({})) -> str:
    """The library's `` `jpeg_quality` `` as the command line has it: ``--jpeg-quality``. ``arguments`` are those of a command by
    their names: elsewhere there is an option of that name."""
    known = {**SPELLING, **arguments}
    return re.sub("`([a-z0-9_]+)`", lambda match: known.get(match[1]) or match[0], text)


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
    metavar = None
    if get_origin(kind) is tuple and get_args(kind)[-1] is ...:  # given several times; then in the default's place
        each = get_args(kind)[0]
        several, metavar = list[each], f"<{each.__name__.lower()}>"  # type: ignore[valid-type]
        kind, default = (several, MISSING) if default is MISSING else (several | None, None)
    if setting.argument is not None:
        info = typer.Argument(metavar=setting.argument, help=setting.help, min=setting.low, max=setting.high)
        SPELLING.setdefault(what.field, setting.argument)
    else:
        names = [setting.option] if setting.option else []
        panel = setting.group or group_of(what.owner)
        info = typer.Option(
            *names, help=setting.help, min=setting.low, max=setting.high, metavar=metavar, rich_help_panel=panel
        )
        SPELLING[what.name] = _dashed(what.name)
        if SPELLING.get(what.field) != _dashed(what.field):  # else it is the name of an option, of whatever command
            SPELLING[what.field] = SPELLING[what.name]
    empty = inspect.Parameter.empty if default is MISSING else default
    return inspect.Parameter(what.name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, info], default=empty)


def _argument_info(option: inspect.Parameter) -> Any:
    """What typer is told of an argument; None of an option."""
    found = getattr(option.annotation, "__metadata__", ())
    return next((info for info in found if isinstance(info, typer.models.ArgumentInfo)), None)


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
        if (setting := setting_of(annotation)[1]) is not None:
            check_value(parameter.name, setting, value)
        if value is None and parameter.default is not parameter.empty:
            return parameter.default
        return tuple(value) if isinstance(value, list) else value
    known = partial(config, **given_fields(config, values, instead=words_of(annotation)))
    return known if get_origin(setting_of(annotation)[0]) is partial else known()


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")
