"""What of the documentation is made when it is built: every command and the Python reference, from the code itself."""

import sys
import tempfile
from dataclasses import MISSING, is_dataclass
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_linked = Path(tempfile.mkdtemp())
(_linked / "rob").mkdir()  # the package is the root itself, in which there is more than the package
for part in ("__init__.py", "cli.py", "benchmarks", "common", "student_train", "teacher_cache"):
    (_linked / "rob" / part).symlink_to(ROOT / part)
sys.path.insert(0, str(_linked))

PICTURES = ("assets/pipeline.svg", "assets/demo.png")
PAGES = {
    "benchmarks.md": "benchmarks/README.md",
    "loss_notes.md": "benchmarks/loss_notes.md",
    "notes_prototypes.md": "benchmarks/notes_prototypes.md",
    "teacher_cifar10.md": "assets/teacher_cifar10.md",
}
"""Of the repository, outside of docs/."""
LINKS = {
    "](../README.md#try-it)": "](index.md)",
    "](../assets/teacher_cifar10.md": "](teacher_cifar10.md",
    "](../assets/": "](assets/",
    "](../benchmarks/README.md": "](benchmarks.md",
    "](../docs/": "](",
}
"""From where a page is in the repository to where it is in the site."""


@event_priority(100)  # before mkdocstrings reads them
def on_config(config: Any) -> Any:
    """Where mkdocstrings finds the package."""
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(_linked)]
    return config


def on_files(files: Files, config: Any) -> Files:
    for path in PICTURES:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for page, path in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text()))
    files.append(File.generated(config, "commands.md", content=commands()))
    files.append(File.generated(config, "python.md", content=python()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    for link, here in LINKS.items():
        markdown = markdown.replace(link, here)
    return markdown


# ==== commands ====


def commands() -> str:
    """Markdown of every command, out of the application itself."""
    import typer

    from rob.cli import app

    group: Any = typer.main.get_command(app)
    context = group.make_context("rob", ["--help"], resilient_parsing=True)
    parts = ["# Commands", "What `--help` prints, from the same source. `rob COMMAND --help` says it on a terminal."]
    for name in group.list_commands(context):
        command = group.commands[name]
        if hasattr(command, "commands"):
            for inner in command.list_commands(context):
                parts += _command(f"rob {name} {inner}", command.commands[inner])
        else:
            parts += _command(f"rob {name}", command)
    return "\n\n".join(parts) + "\n"


def _command(name: str, command: Any) -> list[str]:
    from rob.common.options import MANY

    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    usage = " ".join([name, *(_placeholder(p) for p in arguments), "[OPTIONS]" if options else ""])
    parts = [f"## {name}", _plain(command.help or ""), f"```sh\n{usage.strip()}\n```"]
    groups: dict[str, list[Any]] = {"Arguments": arguments} if arguments else {}
    for option in options:
        panel = option.rich_help_panel if len(options) >= MANY else None  # as --help does
        groups.setdefault(panel or "Options", []).append(option)
    for title, members in groups.items():
        rows = [_row(member) for member in members]
        parts += [f"**{title}**", "| | | default |\n|---|---|---|\n" + "\n".join(row for row in rows if row)]
    return parts


def _placeholder(argument: Any) -> str:
    return argument.metavar or argument.name.upper()


def _row(parameter: Any) -> str:
    if getattr(parameter, "hidden", False):
        return ""
    name = ", ".join(parameter.opts + parameter.secondary_opts)
    if parameter.param_type_name == "argument":
        name = _placeholder(parameter)
    default = parameter.default
    shown = (
        "required" if parameter.required else "" if default in (None, False, (), []) or callable(default) else default
    )
    return f"| `{name}` | {_plain(getattr(parameter, 'help', None) or '')} | {_code(shown)} |"


# ==== Python ====


def python() -> str:
    """A heading for each public name, its docstring by mkdocstrings, and its settings where it is a configuration."""
    import rob

    parts = [
        "# Python",
        "Everything that `import rob` offers. A configuration's settings are also the commands' options.",
    ]
    functions = [name for name in rob.__all__ if name[0].islower()]
    for title, names in (
        ("Functions", functions),
        ("Configurations and classes", [n for n in rob.__all__ if n not in functions]),
    ):
        parts.append(f"## {title}")
        for name in names:
            thing = getattr(rob, name)
            home = f"{thing.__module__}.{thing.__qualname__}"
            parts += [f"::: {home}\n    options:\n      heading_level: 3"]
            if is_dataclass(thing) and isinstance(thing, type):
                parts += _settings(thing)
    return "\n\n".join(parts) + "\n"


def _settings(kind: type) -> list[str]:
    from rob.common.settings import described

    rows = [
        f"| `{one.field}` | {_plain(one.setting.help)} | {'required' if one.default is MISSING else _code(one.default)} |"
        for one in described(kind)
        if one.owner == kind.__name__
    ]
    return ["| setting | | default |\n|---|---|---|\n" + "\n".join(rows)] if rows else []


def _code(value: Any) -> str:
    return f"`{value}`" if value not in ("", None) else ""


def _plain(text: str) -> str:
    """A docstring in Markdown, on one line, with nothing of it taken for a tag or the end of a cell."""
    return " ".join(text.replace("``", "`").split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
