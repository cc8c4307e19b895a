"""What the kept results of a long benchmark were made with, so that those of other settings are not taken for new ones."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rob.common.errors import MisuseError
from rob.common.files import first_difference, replacing

SETTINGS_NAME = "settings.json"


def keep_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Write ``out/settings.json``: all that every result in ``out`` depends on, but what has folders of its own there.

    A folder with results and without that file is one from before it was written: its results are taken for these settings'.
    MisuseError: the folder's results were made with others.
    """
    wanted, file = json.loads(json.dumps(settings)), out / SETTINGS_NAME
    if file.exists():
        different = first_difference(json.loads(file.read_text()), wanted)
        if different:
            name, was, now = different
            raise MisuseError(
                f"{out} has results with {name} = {was}, this run has {name} = {now}: give another OUT, or delete that folder"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    with replacing(file) as open_file:
        open_file.write((json.dumps(wanted, indent=2) + "\n").encode())
