"""A run onto the Hub: a folder with weights, model card and exported files, and huggingface_hub's upload of it."""

import shutil
from collections.abc import Callable
from pathlib import Path

from ...common.errors import FailureError, MisuseError, first_line
from ...common.files import replacing
from ...common.weights import hash_weights
from ..checkpoint import WEIGHTS_NAME, load_student
from ..evaluate.results import of_weights, read_results
from ..students import num_macs, num_parameters
from .card import Facts, card, licence_of, read_settings, teachers_of
from .config import PushConfig
from .exported_file import read_exports, write_exports
from .graph import Graph
from .input_form import WithInput
from .timm_folder import is_for_timm, write_timm

FOLDER = "hub"
"""In the run: what was or would be sent."""


def push(config: PushConfig, teacher_licence: Callable[[str], str | None]) -> tuple[Path, str | None]:
    """Write ``RUN/hub`` and send it; the folder, and where it is now (None: a dry run).

    MisuseError: no run there. FailureError: the Hub cannot be reached, or does not take it.
    """
    if not config.run.is_dir():
        raise MisuseError(f"{config.run} is no folder: give a finished run's folder")
    folder = write_folder(config, teacher_licence)
    return folder, None if config.dry_run else _send(config, folder)


def write_folder(config: PushConfig, teacher_licence: Callable[[str], str | None]) -> Path:
    """Weights as timm reads them (a small-image CNN: as rob does), the files of ``export.json`` that are of these weights, and
    the card."""
    backbone, info = load_student(config.run)
    weights = hash_weights(backbone.state_dict())
    exports = [
        entry
        for name, entry in read_exports(config.run).items()
        if entry.weights == weights and entry.format != "timm" and (config.run / name).exists()
    ]
    teachers = teachers_of(read_settings(config.run))
    facts = Facts(
        config.name,
        config.run,
        info,
        num_parameters(backbone),
        num_macs(backbone, info.image_size),
        config.licence,
        licence_of(teachers, teacher_licence),
        exports,
        of_weights(read_results(config.run), weights),
    )
    # What is damaged in the run is said before anything is written.
    text = card(facts) if config.card is None else read_card(config.card)
    folder = config.run / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    try:
        if is_for_timm(info):
            network = WithInput(backbone, "normalised", info.image_size, info.mean, info.std)
            write_timm(Graph(network, info, 0, {}), folder)
        else:
            folder.mkdir()
            shutil.copyfile(config.run / WEIGHTS_NAME, folder / WEIGHTS_NAME)
        for entry in exports:
            source = config.run / entry.file
            copy = shutil.copytree if source.is_dir() else shutil.copyfile
            copy(source, folder / entry.file)
        if exports:
            write_exports(folder, exports)
    except OSError as error:
        raise FailureError(f"cannot write {folder}: {error.strerror or error}") from error
    with replacing(folder / "README.md") as file:
        file.write(text.encode())
    return folder


def read_card(path: Path) -> str:
    """MisuseError: it is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MisuseError(f"`card` {path} cannot be read ({first_line(error)}): give the README.md to send") from None


def _send(config: PushConfig, folder: Path) -> str:
    from huggingface_hub import HfApi

    api = HfApi(library_name="rob")
    try:
        repository = api.create_repo(config.name, private=config.private, exist_ok=True)
        api.upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message="Add the model")
    except Exception as error:  # of the client, of HTTP, of the network: each has classes of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FailureError(
            f"{config.name} was not sent ({reason}): log in with hf auth login, and look at the network; {folder} is what would "
            "be sent"
        ) from error
    return str(repository)
