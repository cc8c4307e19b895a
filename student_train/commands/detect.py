"""``rob eval detect``."""

from ...common.screen import bar, note, show_table
from ..evaluate.config import DetectConfig
from .subject import Out


def detect(config: DetectConfig, out: Out = None) -> None:
    """Box and mask AP of a Faster or Mask R-CNN with the student as its backbone, all of it fine-tuned."""
    from ...common.ranks import refuse_ranks
    from ..evaluate.detection.detect import DetectProgress, detect
    from ..evaluate.results import write_result

    refuse_ranks("rob eval detect")
    folder = out or (config.run if config.run.is_dir() else None)
    with bar("training", "steps") as training, bar("testing", "images") as testing:
        result = detect(config, folder, DetectProgress(training, testing, note))
    show_table(
        f"detection with {result.student}, {config.init} initialisation, on {result.num_test} images",
        ("", "AP %", "AP50 %", "AP75 %"),
        [
            (name, score.ap, score.ap50, score.ap75)
            for name, score in (("box", result.box), ("mask", result.mask))
            if score
        ]
        + [(f"box, {name}", ap, None, None) for name, ap in result.per_class.items()],
    )
    if folder:
        task = "detect" if config.init == "student" else f"detect-{config.init}"
        settings = {"train": f"{config.data} {config.train}", "test": f"{config.data} {config.test}"}
        settings |= {"side": config.side, "channels": config.channels, "epochs": config.epochs}
        settings |= {"batch_size": config.batch_size, "lr": config.lr, "seed": config.seed}
        note(f"written to {write_result(folder, task, {**settings, **result.to_json()}, note)}")
        kept = folder / "eval" / f"{task}.safetensors"
        note(f"the detector is {kept}: rob export {kept} --data PACKED_IMAGES makes ONNX of it")
