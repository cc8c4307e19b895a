"""``rob finetune classify`` and ``segment``."""

from ...common.screen import bar, note, note_slow_loader, show_table
from ..finetune.config import ClassifyConfig, SegmentConfig


def classify(config: ClassifyConfig) -> None:
    """A classifier from labelled images, all layers trained; the best epoch is kept, for rob export."""
    from ...common.ranks import refuse_ranks
    from ..finetune.classify import finetune_classifier
    from ..finetune.folder import TuneProgress

    refuse_ranks("rob finetune")
    note_slow_loader(config.loader)
    with bar("training", "steps") as training, bar("validating", "images") as validating:
        result = finetune_classifier(config, TuneProgress(training, validating, note))
    show_table(
        f"{result.student}, {config.init}, fine-tuned on {result.num_train:,} images: {len(result.per_class)} classes",
        ("", "top-1 %"),
        [(f"{result.num_val:,} validation images, epoch {result.best_epoch} of {result.epochs}", result.top1)]
        + [(name, top1) for name, top1 in result.per_class.items()],
        named=True,
    )
    note(f"written to {result.weights}: rob export {config.out} --to onnx makes a file for devices")


def segment(config: SegmentConfig) -> None:
    """A segmenter from images with masks, all layers trained; the best epoch is kept, for rob export."""
    from ...common.ranks import refuse_ranks
    from ..finetune.folder import TuneProgress
    from ..finetune.segment import finetune_segmenter

    refuse_ranks("rob finetune")
    with bar("training", "steps") as training, bar("validating", "images") as validating:
        result = finetune_segmenter(config, TuneProgress(training, validating, note))
    show_table(
        f"{result.student}, {config.init}, fine-tuned: epoch {result.best_epoch} of {result.epochs}, {result.num_train:,} images",
        ("", "IoU %"),
        [(f"mean, of {result.num_val:,} validation images", result.score.miou)]
        + [(name, iou) for name, iou in result.score.iou.items()]
        + [("pixel accuracy", result.score.pixel_accuracy)],
        named=True,
    )
    note(f"written to {result.weights}: rob export {config.out} --to onnx makes a file for devices")
