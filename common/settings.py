"""Settings: the fields of a frozen configuration, each described once, where the configuration is defined::

    @dataclass(frozen=True)
    class PackConfig:
        jpeg_quality: Annotated[int, Setting("For images that must be encoded anew.", low=1, high=100)] = 95

        def __post_init__(self) -> None:
            check(self)

From this follow the check in Python, the option of the command line with its range, default and help (``options``), and the
name in an error: the library says `` `jpeg_quality` ``, the command line ``--jpeg-quality``. Modules of configurations import
nothing that is slow, so that ``--help`` can read them. A type that several configurations share is given a name
(``Seed = Annotated[int, Setting(...)]``).
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from .errors import MisuseError, unknown_name
from .places import ADDRESS, shown


@dataclass(frozen=True)
class Setting:
    """What there is to say of a field beside its type and default. ``low`` and ``high`` are the range, both included.

    ``option`` is how the command line spells it, where that is not the field's name (``--loader``, ``--shuffle/--keep-order``; a
    flag that has no opposite names itself). ``argument`` is the placeholder of one that has no name there (``DATA.beton``).
    """

    help: str = ""
    low: float | None = None
    high: float | None = None
    choices: Collection[str] | None = None
    option: str | None = None
    argument: str | None = None
    kind: Any = None
    """What the command line reads, where that is not the field's type."""
    address: bool = False
    """Of a path in ``WRITTEN``: whether it may be one of a bucket."""
    group: str | None = None
    """The heading that ``--help`` lists it under, where that is not its configuration's."""


WRITTEN = ("out", "sheet")
"""Settings that say where something is to be written."""
Words = Mapping[str, Setting | None]


class Described(NamedTuple):
    """A field with its setting; ``name`` is that of its option, as a name in Python."""

    field: str
    name: str
    kind: Any
    setting: Setting
    default: Any
    """``MISSING``: it has to be given."""
    owner: str = ""
    """The configuration that it is a field of."""


def setting_of(annotation: Any) -> tuple[Any, Setting | None]:
    """``Annotated[int, Setting(...)]`` -> its type and its setting (None: it has none)."""
    if get_origin(annotation) is not Annotated:
        return annotation, None
    kind, *notes = get_args(annotation)
    return kind, next((note for note in notes if isinstance(note, Setting)), None)


def words_of(annotation: Any) -> Words:
    """The mapping among the notes of an ``Annotated`` configuration."""
    return next((note for note in get_args(annotation) if isinstance(note, Mapping)), {})


def option_name(field: str, setting: Setting) -> str:
    """``loader`` for the field ``backend`` that is spelled ``--loader``."""
    return setting.option.split("/")[0].removeprefix("--").replace("-", "_") if setting.option else field


@cache
def _annotations(config: type) -> Mapping[str, Any]:
    return get_type_hints(config, include_extras=True)


def check(config: Any) -> None:
    """MisuseError naming the first field of a configuration that is out of its range or none of its choices."""
    for name, annotation in _annotations(type(config)).items():
        _, setting = setting_of(annotation)
        if setting is not None:
            check_value(name, setting, vars(config).get(name))


def check_value(name: str, setting: Setting, value: Any) -> None:
    """MisuseError: the value, or one of several, is out of range or none of the choices."""
    for each in value if isinstance(value, tuple | list) else (value,):
        _check_one(name, setting, each)


def _check_one(name: str, setting: Setting, value: Any) -> None:
    low, high, choices = setting.low, setting.high, setting.choices
    if value is None:
        return
    if choices is not None and value not in choices:
        raise unknown_name(option_name(name, setting).replace("_", " "), value, choices)
    if isinstance(value, Path):
        if name not in WRITTEN or setting.address or not ADDRESS.fullmatch(str(value)):
            return
        raise MisuseError(
            f"`{name}` {shown(value)} is an address, and this is written to this machine: give a path, and copy it there then"
        )
    # Written so that NaN, which compares false to everything, is refused.
    if low is not None and not value >= low:
        raise MisuseError(f"`{name}` is {value}, expected at least {low:g}")
    if high is not None and not value <= high:
        raise MisuseError(f"`{name}` is {value}, expected at most {high:g}")


def described(config: type, defaults: Any = None, instead: Words = MappingProxyType({})) -> Iterator[Described]:
    """Every setting of a configuration, and of the configurations in its fields.

    ``defaults``, an instance, has other defaults than the class. ``instead`` has other words for some fields, or None for one
    that is no option here; of a configuration in a field it is a note: ``Annotated[LoaderConfig, {"batch_size": Setting(...)}]``.
    """
    for field, kind, setting, words in _fields(config, instead):
        default = _default(field, defaults)
        if is_configuration(kind):
            yield from described(kind, None if default is MISSING else default, words)
        elif setting is not None:
            yield Described(
                field.name, option_name(field.name, setting), setting.kind or kind, setting, default, config.__name__
            )


def given_fields(
    config: type, options: Mapping[str, Any], defaults: Any = None, instead: Words = MappingProxyType({})
) -> dict[str, Any]:
    """The fields of a configuration out of values by the names of options; None leaves a field at its default."""
    found: dict[str, Any] = {}
    for field, kind, setting, words in _fields(config, instead):
        default = _default(field, defaults)
        value = None if setting is None else options.get(option_name(field.name, setting))
        if is_configuration(kind):
            found[field.name] = kind(**given_fields(kind, options, None if default is MISSING else default, words))
        elif value is not None:
            found[field.name] = tuple(value) if isinstance(value, list) else value
        elif default is not MISSING:
            found[field.name] = default
    return found


def is_configuration(kind: Any) -> bool:
    """Whether it is a dataclass, whose settings are options, too."""
    return isinstance(kind, type) and is_dataclass(kind)


def _fields(config: type, instead: Words) -> Iterator[tuple[Field, Any, Setting | None, Words]]:
    """Those that are not left out, each with its type, its setting, and the words for what is in it."""
    for field in fields(config):
        annotation = _annotations(config)[field.name]
        kind, setting = setting_of(annotation)
        setting = instead.get(field.name, setting)
        if field.name not in instead or setting is not None:
            yield field, kind, setting, words_of(annotation)


def _default(field: Field, defaults: Any) -> Any:
    """``MISSING`` where there is none."""
    if defaults is not None:
        return vars(defaults)[field.name]
    return field.default if field.default_factory is MISSING else field.default_factory()
