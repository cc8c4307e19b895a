"""The model card: what the network is, how it was made and from what, its licence, and what was measured by which command."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.errors import FailureError, MisuseError
from ...common.records import read_record
from ..begun import with_teacher
from ..evaluate.compare import headline
from ..students import StudentInfo
from .exported_file import ExportedFile
from .timm_folder import is_for_timm, lines_without_timm

UNKNOWN = "not known to rob: look it up where its weights are published"
FLAGS = {"linear-augment": " --augment", "lowshot-finetune": " --finetune", "lowshot-msn": " --protocol msn"}
"""What makes these tasks of the commands without it."""
USUAL_K = 20


@dataclass(frozen=True)
class Facts:
    """What a card says of a network. ``name`` is that on the Hub; ``teacher_licence`` None where the teacher is not known."""

    name: str
    run: Path
    info: StudentInfo
    parameters: int
    macs: int
    licence: str | None
    teacher_licence: str | None
    exports: Sequence[ExportedFile]
    results: Mapping[str, Mapping[str, Any]]
    """Of these weights, by task."""


def read_settings(run: Path) -> dict[str, Any]:
    """A run's ``config.json``; nothing where there is none. MisuseError: damaged."""
    path = run / "config.json"
    if not path.exists():
        return {}
    try:
        return read_record(path, dict[str, Any], "run rob train-student in its folder again")
    except FailureError as problem:
        raise MisuseError(str(problem)) from None


def teachers_of(settings: Mapping[str, Any]) -> list[str]:
    """The names of a run's teachers; none where it had none, or does not say."""
    return [str(one["teacher"]) for one in with_teacher(settings.get("branch", {}))]


def licence_of(teachers: Sequence[str], licence: Callable[[str], str | None]) -> str | None:
    """Of their weights, of several each by its name. None: there is no teacher, or of a single one it is not known."""
    if len(teachers) < 2:
        return licence(teachers[0]) if teachers else None
    return "; ".join(f"{name}: {licence(name) or UNKNOWN}" for name in teachers)


def card(facts: Facts) -> str:
    """Markdown with the Hub's front matter."""
    library = "timm" if is_for_timm(facts.info) else "pytorch"
    head = ["---", f"library_name: {library}", "pipeline_tag: image-feature-extraction"]
    head += [f"license: {facts.licence}"] if facts.licence else []
    head += ["tags:", "- image-feature-extraction", "- self-supervised", "- distillation", "- rob", "---"]
    sections = [_what(facts), _use(facts), _made(facts), _measured(facts), _exported(facts)]
    return "\n".join(head) + "\n" + "\n".join(section for section in sections if section)


def _what(facts: Facts) -> str:
    info = facts.info
    form = ", in its small-image form" if info.small_images else ""
    return (
        f"# {facts.name}\n\n"
        f"A backbone without a classifier, trained without labels by [rob](https://arxiv.org/abs/2301.09451): {info.name}{form}, "
        f"{facts.parameters / 1e6:.2f} M parameters, {facts.macs / 1e6:.0f} M multiply-accumulates at {info.image_size} px. "
        f"Images are RGB, normalised by mean {_numbers(info.mean)} and deviation {_numbers(info.std)}.\n"
    )


def _use(facts: Facts) -> str:
    if is_for_timm(facts.info):
        code = f'import timm\nbackbone = timm.create_model("hf-hub:{facts.name}", pretrained=True).eval()'
    else:
        code = lines_without_timm("student.safetensors", facts.info)
    why = "" if is_for_timm(facts.info) else "timm has no argument for the strides of this network; rob builds it:\n\n"
    if facts.info.is_own:
        why = (
            f"The file has the tensors of {facts.info.name} by their own names (`load_state_dict`). As a backbone:\n\n"
        )
    return f"## Use\n\n{why}```python\n{code}\n```\n"


def _made(facts: Facts) -> str:
    settings = read_settings(facts.run)
    if not settings:
        return ""
    branch, loader = settings.get("branch", {}), settings.get("loader", {})
    teacher = ", ".join(teachers_of(settings))
    lines = [
        ("images", f"{Path(str(settings.get('data'))).name}, packed; fingerprint `{settings.get('data_fingerprint')}`"),
        ("targets", str(branch.get("kind"))),
        ("teacher", teacher or "none: the student's own past"),
    ]
    lines += [("licence of the teacher's weights", facts.teacher_licence or UNKNOWN)] if teacher else []
    recipe, objective = settings.get("recipe", {}), settings.get("objective", {})
    lines += [
        ("views", f"recipe {recipe.get('name')}"),
        ("objective", str(objective.get("name"))),
        ("training", f"{settings.get('epochs')} epochs, batch {loader.get('batch_size')}, seed {settings.get('seed')}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in settings.get("versions", {}).items())),
    ]
    return "## How it was made\n\n" + _table(("", ""), lines)


def _measured(facts: Facts) -> str:
    rows = []
    for task, result in facts.results.items():
        command = _command(task, result)
        rows += [(name, f"{score:.2f} %", f"`{command}`") for name, score in headline(task, result).items()]
    return "## Measured\n\n" + _table(("task", "result", "command"), rows) if rows else ""


def _command(task: str, result: Mapping[str, Any]) -> str:
    """What measures it again; images by the names of their files."""
    task, start = task.removesuffix("-random"), " --init random" if task.endswith("-random") else ""
    return f"rob eval {_measurement(task, result)}{start}"


def _measurement(task: str, result: Mapping[str, Any]) -> str:
    kind = task.split("-")[0]
    if kind == "transfer":
        return f"transfer RUN {task.removeprefix('transfer-')} --root DATA"
    if kind == "detect":
        return "detect RUN DATA"
    train, test = Path(str(result.get("train"))).name, str(result.get("test"))
    if kind == "segment":
        return f"segment RUN {train} {Path(test).name}"
    tested = "" if test.startswith("a fifth of ") else f" --test {Path(test).name}"
    neighbours = f" --k {result['k']}" if result.get("k", USUAL_K) != USUAL_K else ""
    features = f" --features {result['pooling']}" if "pooling" in result else ""
    labels = "".join(_share(entry.get("share", {})) for entry in result.get("results", ()))
    return f"{kind} RUN {train}{tested}{FLAGS.get(task, '')}{labels}{neighbours}{features}"


def _share(share: Mapping[str, Any]) -> str:
    """The option for so many labels."""
    if share.get("fraction"):
        return f" --percent {100 * share['fraction']:g}"
    if share.get("per_class"):
        return f" --per-class {share['per_class']}"
    return f" --subset {Path(share['file']).name}" if "file" in share else ""


def _exported(facts: Facts) -> str:
    if not facts.exports:
        return ""
    rows = [
        (
            entry.file,
            f"{entry.bytes / 1e6:.2f}",
            "not run" if entry.latency_ms is None else f"{entry.latency_ms:.2f}",
            "not checked" if entry.agreement is None else f"{entry.agreement.lowest_cosine:.4f}",
            entry.runtime,
        )
        for entry in facts.exports
    ]
    columns = ("file", "MB", "ms, one thread", "lowest cosine with torch", "runtime")
    return "## Files for devices\n\n" + _table(columns, rows) + "\nInput forms and more are in `export.json`.\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
