"""The application: the commands of the packages, what joins both stages, and errors as exit codes.

Stages are imported inside the commands, so that --help is instant.
"""

import io
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from rob import __version__
from rob.benchmarks.gpu_check.config import GpuCheckConfig
from rob.common.commands import doctor, inspect, pack, views
from rob.common.config import Device, Overwrite
from rob.common.errors import FailureError, MisuseError, is_out_of_memory, printable, unknown_name
from rob.common.files import refuse_existing
from rob.common.heap import keep_freed_memory
from rob.common.options import GroupedCommand, command
from rob.common.screen import bar, console, note, show_table, waiting
from rob.common.settings import Setting
from rob.common.signals import end_with_parent
from rob.student_train.commands.check import check
from rob.student_train.commands.compare import compare
from rob.student_train.commands.detect import detect
from rob.student_train.commands.embed import embed
from rob.student_train.commands.evaluate import knn, linear, lowshot, transfer
from rob.student_train.commands.export import export, export_teacher
from rob.student_train.commands.finetune import classify, segment
from rob.student_train.commands.of_runs import of_runs
from rob.student_train.commands.preset import PresetCommand
from rob.student_train.commands.push import push
from rob.student_train.commands.report import report
from rob.student_train.commands.segment import segment as probe_segmentation
from rob.student_train.commands.students import students
from rob.student_train.commands.sweep import sweep
from rob.student_train.commands.train import train_student
from rob.teacher_cache.commands import cache_teacher, teachers, verify

if TYPE_CHECKING:
    from rob.common.views.recipes import RecipeOverrides
    from rob.teacher_cache.teachers import Teacher


def main() -> None:
    """Entry point: one sentence and exit code 2 for misuse, 1 for a failed run, 130 for Ctrl-C."""
    end_with_parent()
    keep_freed_memory()
    warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of matplotlib's: a name's letters become boxes
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for the name of a file that no encoding fits
    try:
        app(prog_name="rob")
    except (MisuseError, FailureError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2 if isinstance(error, MisuseError) else 1)
    except OSError as error:  # a disk, a permission, a network: what the system says is the sentence
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {printable(f'{where}{error.strerror or error}')}", file=sys.stderr)
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print("error: out of memory: lower --batch-size, the size of the views, or --prototypes", file=sys.stderr)
        sys.exit(1)
    except SystemExit as ended:
        stopped = getattr(ended.__context__, "__cause__", None)  # a Ctrl-C, which typer turns into an exit
        if isinstance(stopped, KeyboardInterrupt) and not stopped.args:  # with some, whoever raised it has said more
            print("stopped: run the same command again", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        sys.exit(130)


# ==== what needs both stages ====


def load_teacher(name: str, checkpoint: Path | None) -> "Teacher":
    """The teacher that stage 2 runs online, or measures."""
    from rob.teacher_cache.teachers import TeacherConfig, load_teacher

    return load_teacher(TeacherConfig(name, checkpoint))


def views_of_preset(name: str) -> "tuple[str, RecipeOverrides, int]":
    """What stage 1 caches for stage 2's preset."""
    from rob.student_train.presets import get_preset

    preset = get_preset(name)
    return preset.recipe, preset.areas, preset.views


def crops_of_preset(name: str) -> "tuple[str, RecipeOverrides]":
    """What stage 2's preset shows the student: the recipe, and what is changed of it."""
    from rob.student_train.presets import get_preset

    preset = get_preset(name)
    return preset.recipe, replace(preset.areas, num_local=preset.pairing.num_local)


def teacher_licence(name: str) -> str | None:
    """Of a published teacher's weights; None: it is not known here."""
    from rob.teacher_cache.registry import teacher_table

    return next((row["licence"] for row in teacher_table() if row["name"] == name), None)


def demo(
    out: Annotated[Path, Setting("Its folder; what a demo that was killed left there is replaced.")] = Path(
        "runs/demo"
    ),
    teacher: Annotated[
        str, Setting("ours, self-supervised; or efficientnet_lite0, larger, which had labels.")
    ] = "ours",
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """The whole idea on Fashion-MNIST, in minutes."""
    from rob.benchmarks.demo import DemoConfig, DemoScreen, run

    refuse_existing(out / "summary.json", overwrite)
    summary = run(DemoConfig(out, teacher, device=device), DemoScreen(note, bar))
    linear_top1, knn_top1 = summary["linear_top1"], summary["knn_top1"]
    rows = [(name.replace("_", " "), linear_top1[name], knn_top1[name]) for name in linear_top1]
    show_table("Fashion-MNIST, top-1", ("features", "linear %", "k-NN %"), rows, named=True)
    note("  ".join(f"{name} {seconds:.0f} s" for name, seconds in summary["seconds"].items()))
    note(
        f"written to {out}: report.html, curve.png, summary.json, student/student.safetensors and student/student.onnx"
    )


def behind_spinner(function: Callable[..., None], group: str = "rob") -> Callable[..., None]:
    """``function``, a command of ``group``, behind a spinner until it shows something of its own: its libraries take seconds
    to load."""

    @wraps(function)
    def run(*arguments: Any, **options: Any) -> None:
        with waiting(f"{group} {function.__name__.replace('_', '-')}: loading its libraries"):
            function(*arguments, **options)

    return run


BENCHMARKS = {
    "pipeline": "PipelineConfig",
    "branches": "BranchesConfig",
    "loader": "LoaderBenchConfig",
    "store": "StoreBenchConfig",
    "cache": "CacheBenchConfig",
    "precision": "PrecisionConfig",
    "loss": "LossConfig",
}
"""Modules of ``rob.benchmarks`` and the names of their configurations."""


def bench(
    name: Annotated[str, Setting("pipeline, branches, loader, store, cache, precision or loss.", argument="NAME")],
    out: Annotated[
        Path | None, Setting("JSON to write; default benchmarks/results/NAME_DEVICE_DATE.json, a new one.")
    ] = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Measure one part against its peers and its floor."""
    from importlib import import_module

    if name not in BENCHMARKS:
        raise unknown_name("benchmark", name, BENCHMARKS)
    if out is not None:
        refuse_existing(out, overwrite)
    try:
        from rob.benchmarks.report import shown_by

        module = import_module(f"rob.benchmarks.{name}")
        settings = getattr(module, BENCHMARKS[name])
        with (
            waiting(f"preparing {name}; the table comes at the end"),
            bar(f"measuring {name}", "parts") as update,
            shown_by(update),
        ):
            report = module.run(settings(device=device) if "device" in settings.__dataclass_fields__ else settings())
    except ModuleNotFoundError as missing:
        raise MisuseError(
            f"bench {name} measures {missing.name}, too, which is not installed here: rob doctor says what brings it"
        ) from missing
    report.show(console)
    note(f"written to {report.write(out)}")


def gpu_check(config: GpuCheckConfig) -> None:
    """What works on this GPU and how fast; kept for later runs. Exit code 1 where a check failed."""
    from rob.benchmarks.gpu_check.check import passed, run, tables

    report = run(config, note)
    for table in tables(report):
        table.show(console)
    note(f"written to {config.out}" + (f"; settings to {report['stored']}" if "stored" in report else ""))
    if not passed(report):
        raise typer.Exit(1)


# ==== the application ====

WIDEST_HELP = 160
"""Columns; it is as wide as the terminal up to here."""


class WholeSummaries(TyperGroup):
    """Lists its commands with the whole first sentence of each, on several lines where the terminal is narrow, and offers the
    nearest ones to a name that is none."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, found.get_short_help_str(limit=1000)) for name, found in commands if found])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            raise unknown_name("command", args[0], self.list_commands(ctx))
        return super().resolve_command(ctx, args)


class InOrder(WholeSummaries):
    """Lists ``eval`` and ``finetune``, groups, where they are used, not behind all commands."""

    def list_commands(self, ctx: Any) -> list[str]:
        groups = ["eval", "finetune"]
        names = [name for name in super().list_commands(ctx) if name not in groups]
        after = names.index("train-student") + 1
        return names[:after] + groups + names[after:]


app = typer.Typer(
    cls=InOrder,
    help="Tiny vision backbones without labels: run a teacher once, train many students from its cached targets.",
    no_args_is_help=True,
    context_settings={"max_content_width": WIDEST_HELP},
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)


def show_version(asked: bool) -> None:
    """Callback of the eager ``--version``."""
    if asked:
        print(f"rob {__version__}")
        raise typer.Exit


@app.callback()
def application(
    asked: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=show_version, help="The version.")
    ] = False,
) -> None:
    """What comes before a command."""


evaluate = typer.Typer(
    cls=WholeSummaries,
    help="Measure a student, a teacher or raw pixels. Features are extracted once and kept in the run's eval folder.",
    no_args_is_help=True,
)
# In the order of the work, in which --help lists them.
app.command(cls=GroupedCommand)(command(behind_spinner(pack)))
app.command(cls=GroupedCommand)(command(behind_spinner(views), crops_of_preset=crops_of_preset))
app.command(cls=GroupedCommand)(command(behind_spinner(teachers)))
app.command("cache-teacher", cls=GroupedCommand)(
    command(behind_spinner(cache_teacher), views_of_preset=views_of_preset)
)
app.command(cls=GroupedCommand)(command(behind_spinner(inspect)))
app.command(cls=GroupedCommand)(command(behind_spinner(students)))
app.command("train-student", cls=PresetCommand)(command(behind_spinner(train_student), load_teacher=load_teacher))
for function in (knn, linear, lowshot, transfer, probe_segmentation):
    evaluate.command(cls=GroupedCommand)(
        command(behind_spinner(of_runs(function), "rob eval"), load_teacher=load_teacher)
    )
evaluate.command(cls=GroupedCommand)(command(behind_spinner(of_runs(detect), "rob eval")))
app.add_typer(evaluate, name="eval")
finetune = typer.Typer(
    cls=WholeSummaries,
    help="Train a student on labels: a classifier or a segmenter to ship.",
    no_args_is_help=True,
)
for function in (classify, segment):
    finetune.command(cls=GroupedCommand)(command(behind_spinner(of_runs(function), "rob finetune")))
app.add_typer(finetune, name="finetune")
for function in (compare, report):
    app.command(cls=GroupedCommand)(command(behind_spinner(of_runs(function))))
app.command(cls=GroupedCommand)(command(behind_spinner(sweep)))
app.command(cls=GroupedCommand)(command(behind_spinner(of_runs(embed)), load_teacher=load_teacher))
app.command(cls=GroupedCommand)(command(behind_spinner(of_runs(export))))
app.command(cls=GroupedCommand)(command(behind_spinner(of_runs(push)), teacher_licence=teacher_licence))
app.command("export-teacher", cls=GroupedCommand)(command(behind_spinner(export_teacher)))
for function in (verify, check, demo, bench):
    app.command(cls=GroupedCommand)(command(behind_spinner(function)))
app.command("gpu-check", cls=GroupedCommand)(command(behind_spinner(gpu_check)))
app.command(cls=GroupedCommand)(command(behind_spinner(doctor)))
