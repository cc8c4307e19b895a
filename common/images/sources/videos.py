"""Videos, by PyAV: an image every so many seconds, named ``FILE/SECONDS``.

Each is found from the key frame before it, so that images are packed in any order by every core; nothing is decoded ahead.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from PIL import Image

from ...cores import usable_cores
from ...errors import MisuseError, first_line, not_installed, some
from ..config import PackConfig
from ..reading import BadImage
from .files import Files
from .folder import by_folder, label_by_folder
from .source import Source

ENDINGS = (
    ".mp4",
    ".mov",
    ".m4v",
    ".mkv",
    ".webm",
    ".avi",
    ".mpg",
    ".mpeg",
    ".ts",
    ".mts",
    ".wmv",
    ".flv",
    ".ogv",
    ".3gp",
)


def open_videos(files: Files, config: PackConfig) -> Source:
    """The frames that are seen at 0, `every`, 2 `every` ... seconds of each video. MisuseError: `every` is not given, a video has
    no frames, or cannot be read, unless ``skip_bad`` leaves it out."""
    names = tuple(name for name in files.names if name.lower().endswith(ENDINGS))
    if not names:
        raise MisuseError(f"{files.place}: no video in it or below; looked for {' '.join(ENDINGS)}")
    if config.every is None:
        raise MisuseError(
            f"{files.at(names[0])}: a video; set `every` to the seconds from one of its images to the next"
        )
    _need_av(files.at(names[0]))
    every, bad, where = config.every, [], {}
    with ThreadPoolExecutor(max(usable_cores(), files.at_once)) as pool:
        found = list(pool.map(lambda name: _seconds(files, name), names))
    for name, seconds in zip(names, found, strict=True):
        if isinstance(seconds, str):
            bad.append(f"{files.at(name)}: {seconds}")
            continue
        times = [number * every for number in range(max(1, -int(-seconds // every)))]
        width = len(f"{times[-1]:.3f}")  # so that the sorted order is that of time
        where |= {f"{name}/{time:0{width}.3f}": (name, time) for time in times}
    if bad and not (config.skip_bad and where):
        raise MisuseError(f"{some(bad)}; repair or remove it, or set `skip_bad`")
    left_out = tuple(f"left out {sentence}" for sentence in bad)
    videos, classes, beside = (names, None, ()) if config.recursive else by_folder(names, str(files.place))
    kept, label_of = set(videos), label_by_folder(classes)

    def read(path: str) -> tuple[Image.Image, int]:
        name, time = where[path]
        return _frame(files, name, time), label_of(name)

    paths = tuple(path for path, (name, _) in where.items() if name in kept)
    return Source(paths, read, classes, left_out + beside, files.folder, str(files.place), files.stamp, files.at_once)


@contextmanager
def _opened(files: Files, name: str) -> Iterator[tuple[Any, Any]]:
    """The container and its first stream of pictures (None: it has none)."""
    import av

    with files.open(name) as file, av.open(file) as container:
        streams = container.streams.video
        if streams:
            streams[0].codec_context.thread_count = 1  # each image has a thread already
        yield container, streams[0] if streams else None


def _seconds(files: Files, name: str) -> float | str:
    """How long its pictures last, or what is wrong with it."""
    from av.error import FFmpegError

    try:
        with _opened(files, name) as (container, stream):
            if stream is None or next(container.decode(stream), None) is None:
                return "a video without frames"
            if stream.duration:
                return float(stream.duration * stream.time_base)
            if container.duration:
                return container.duration / 1e6
            container.seek(0)
            times = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
            return float((max(times) - min(times)) * stream.time_base) if times else 0.0
    except (FFmpegError, OSError) as error:
        return f"cannot be read as a video ({first_line(error)})"


def _frame(files: Files, name: str, seconds: float) -> Image.Image:
    """The frame that is seen ``seconds`` after the first."""
    from av.error import FFmpegError

    try:
        with _opened(files, name) as (container, stream):
            first = stream.start_time or 0
            wanted = first + int(seconds / stream.time_base + 1e-6)
            container.seek(wanted, stream=stream)
            seen = None
            for frame in container.decode(stream):
                if seen is not None and frame.pts is not None and frame.pts > wanted:
                    break
                seen = frame
            if seen is None:
                raise BadImage("no frame at this time")
            image = seen.to_image()
            return image.rotate(seen.rotation, expand=True) if seen.rotation else image
    except FFmpegError as error:
        raise BadImage(first_line(error)) from None


def _need_av(where: str) -> None:
    try:
        import av  # noqa: F401
    except ImportError:
        raise not_installed(f"{where}:", "av", "video") from None
