"""What can be set of a report."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from ...common.config import Device, Overwrite
from ...common.errors import MisuseError
from ...common.settings import Setting, check
from ...common.views.config import LoaderConfig


@dataclass(frozen=True)
class ReportConfig:
    """Which runs, and the images that they are shown on. ``data`` None: where the first run says that its images are."""

    runs: Annotated[
        tuple[Path, ...], Setting("Run folders; the first one's images are the ones shown.", argument="RUN")
    ]
    out: Annotated[Path, Setting("The file to write.")] = Path("report.html")
    data: Annotated[
        Path | None,
        Setting("The training images, where they no longer lie where the first run says."),
    ] = None
    test: Annotated[
        Path | None,
        Setting("Other images, packed, for the map and for where the students look; default the training images."),
    ] = None
    images: Annotated[
        int,
        Setting(
            "Of the training images that neighbours are searched in, and of dots on the map; more takes longer.", low=2
        ),
    ] = 1000
    examples: Annotated[int, Setting("Images that views, neighbours and looks are shown of.", low=1, high=24)] = 6
    overwrite: Overwrite = False
    device: Device = "auto"
    loader: LoaderConfig = field(default_factory=lambda: LoaderConfig(batch_size=64))

    def __post_init__(self) -> None:
        check(self)
        if self.out.suffix not in (".html", ".htm"):
            raise MisuseError(f"`out` {self.out}: the report is HTML, name it {self.out.with_suffix('.html')}")
        if not self.runs:
            raise MisuseError("`runs` is empty: give a run folder")
