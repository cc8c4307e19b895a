"""``rob eval knn``, ``linear``, ``lowshot`` and ``transfer``."""

from pathlib import Path
from typing import Annotated

import typer

from ...common.errors import MisuseError
from ...common.options import refuse
from ...common.screen import bar, show_table
from ...common.settings import Setting
from ..evaluate.config import FinetuneConfig, LinearConfig, LowshotConfig
from .subject import LoadTeacher, Subject, SubjectConfig, Test, Train, What


def knn(
    context: typer.Context,
    what: What,
    data: Train,
    test: Test = None,
    k: Annotated[
        tuple[int, ...],
        Setting(
            "Neighbours that vote, 20 by default. Several times: a sweep, of which the first is the result.", low=1
        ),
    ] = (20,),
    temperature: Annotated[float, Setting("Of the votes.", low=0.001)] = 0.07,
    *,
    config: SubjectConfig,
    load_teacher: LoadTeacher,
) -> None:
    """Weighted k-nearest-neighbour accuracy, as DINO defines it."""
    from ..evaluate.features import brought_to
    from ..evaluate.knn import knn_sweep

    subject = Subject(context, what, config, load_teacher)
    train, held_out = subject.images(data, test)
    results = knn_sweep(*brought_to(subject.network.device, train.features, held_out.features), list(k), temperature)
    show_table(
        f"k-NN of {subject.network.title}",
        ("k", "top-1 %", "top-5 %", "train images", "test images"),
        [(r.k, r.top1, r.top5, r.num_train, r.num_test) for r in results],
    )
    sweep = [result.to_json() for result in results]
    subject.write("knn", data, test, {**sweep[0], "sweep": sweep})


def linear(
    context: typer.Context,
    what: What,
    data: Train,
    training: LinearConfig,
    test: Test = None,
    augment: Annotated[
        bool,
        Setting(
            "Random crops and flips, as DINO does: a forward pass of every image in every epoch.", option="--augment"
        ),
    ] = False,
    *,
    config: SubjectConfig,
    load_teacher: LoadTeacher,
) -> None:
    """A linear classifier on frozen features: a sweep in one pass, the choice made on a tenth of TRAIN, one test."""
    from ..evaluate.features import brought_to
    from ..evaluate.linear import linear
    from ..evaluate.linear_augmented import linear_augmented

    subject = Subject(context, what, config, load_teacher)
    network = subject.network
    task = "linear-augment" if augment else "linear"
    train, held_out = subject.images(data, test)
    with bar("training", "epochs" if augment else "steps") as update:
        if augment:
            saved = subject.folder and subject.folder / "eval" / f"{task}.checkpoint.pt"
            result = linear_augmented(
                network, train, held_out.features, training, subject.loader, checkpoint=saved, progress=update
            )
        else:
            result = linear(*brought_to(network.device, train.features, held_out.features), training, update)
    show_table(
        f"linear classifier on {network.title}",
        ("learning rate", "weight decay", "validation %", "top-1 %", "top-5 %"),
        [
            (f"{s.learning_rate:g}", f"{s.weight_decay:g}", s.validation_top1)
            + ((result.top1, result.top5) if s == result.chosen else ("", ""))
            for s in result.sweep
        ],
    )
    subject.write(task, data, test, result.to_json())


def lowshot(
    context: typer.Context,
    what: What,
    data: Train,
    tuning: FinetuneConfig,
    logistic: LowshotConfig,
    test: Test = None,
    percent: Annotated[
        tuple[float, ...],
        Setting(
            "Of each class of TRAIN; give it several times. Default 1 and 10, if no --per-class and no --subset.",
            low=0.001,
            high=100,
        ),
    ] = (),
    per_class: Annotated[tuple[int, ...], Setting("Images of each class; give it several times.", low=1)] = (),
    subset: Annotated[
        tuple[Path, ...],
        Setting(
            "The images of TRAIN that this file names, one a line, as the published 1 % and 10 % of ImageNet; with --test. "
            "Give it several times."
        ),
    ] = (),
    finetune: Annotated[
        bool, Setting("Train the whole network, not only a classifier on frozen features.", option="--finetune")
    ] = False,
    seeds: Annotated[int, Setting("Subsets: mean and deviation are over them.", low=1)] = 5,
    *,
    config: SubjectConfig,
    load_teacher: LoadTeacher,
) -> None:
    """Few labels: fixed subsets by seed, logistic regression on frozen features or --finetune; mean and deviation."""
    from ...common.images.beton import Beton
    from ..evaluate.features import brought_to
    from ..evaluate.finetune import finetune_lowshot
    from ..evaluate.lowshot import MSN_REGULARISATION, REGULARISATION, Listed, Share
    from ..evaluate.lowshot import lowshot as frozen_lowshot
    from ..evaluate.subsets import listed_rows

    if finetune:
        refuse(context, ("protocol", "regularisation"), "is for frozen features, and this is --finetune")
    else:
        refuse(context, ("epochs", "lr"), "is for --finetune")
    if subset and test is None:
        raise MisuseError("`subset` may name any image of TRAIN, of which a fifth would be tested on: give `test`")
    percents = percent or (() if per_class or subset else (1.0, 10.0))
    shares: list[Share | Listed] = [Share(fraction=p / 100) for p in percents]
    shares += [Share(per_class=n) for n in per_class]
    shares += [Listed(str(file), tuple(listed_rows(file, Beton(data).manifest.paths).tolist())) for file in subset]
    subject = Subject(context, what, config, load_teacher)
    network = subject.network
    train, held_out = subject.images(data, test)
    msn = logistic.protocol == "msn"
    strength = logistic.regularisation
    if strength is None:
        strength = MSN_REGULARISATION if msn else REGULARISATION
    settings = {"epochs": tuning.epochs, "lr": tuning.lr} if finetune else {"regularisation": strength}
    results = []
    for share in shares:
        with bar(str(share), "subsets") as update:
            if finetune:
                kept = subject.folder and subject.folder / "eval" / "finetune"
                result = finetune_lowshot(
                    network, train, held_out, tuning, subject.loader, share, range(seeds), kept, update
                )
            else:
                features = brought_to(network.device, train.features, held_out.features)
                several = range(1 if isinstance(share, Listed) else seeds)
                result = frozen_lowshot(*features, share, several, strength, update, logistic.protocol)
        results.append(result)
    show_table(
        f"few labels, {'fine-tuned' if finetune else 'frozen'} {network.title}",
        ("labels", "train images", "top-1 %", "deviation", "seeds"),
        [
            (str(r.share), r.num_train, r.mean, "" if r.deviation is None else r.deviation, len(r.seeds))
            for r in results
        ],
    )
    task = "lowshot-finetune" if finetune else "lowshot-msn" if msn else "lowshot"
    subject.write(task, data, test, {**settings, "results": [r.to_json() for r in results]})


OF_THE_TASK = {
    "epochs": Setting("Of the linear classifier.", low=1),
    "learning_rates": None,
    "weight_decays": None,
}


def transfer(
    context: typer.Context,
    what: What,
    task: Annotated[
        str,
        Setting(
            "cifar10, cifar100, inaturalist2018, inaturalist2019, inaturalist2021, inaturalist2021-mini, places365, "
            "clevr-count, clevr-dist, or folder: ROOT/train/CLASS and ROOT/test/CLASS (or val).",
            argument="TASK",
        ),
    ],
    root: Annotated[Path, Setting("Where the data lie; a task that is not there says what goes where.")],
    training: Annotated[LinearConfig, OF_THE_TASK],
    download: Annotated[bool, Setting("Fetch what is missing, where torchvision can.", option="--download")] = False,
    packed: Annotated[
        Path | None, Setting("Folder for the packed images, which are used again; default ROOT/packed.")
    ] = None,
    limit: Annotated[int | None, Setting("At most so many training images, spread evenly.", low=1)] = None,
    max_resolution: Annotated[int, Setting("Longest side in pixels of the packed images.", low=8)] = 512,
    *,
    config: SubjectConfig,
    load_teacher: LoadTeacher,
) -> None:
    """Another task: a linear classifier on frozen features, chosen as by rob eval linear, and k-NN."""
    from ..evaluate.features import brought_to
    from ..evaluate.knn import knn
    from ..evaluate.linear import linear
    from ..evaluate.transfer import packed_task

    subject = Subject(context, what, config, load_teacher)
    with bar("packing", "images") as update:
        paths = packed_task(
            task,
            root,
            packed or root / "packed",
            download=download,
            limit=limit,
            max_resolution=max_resolution,
            progress=update,
        )
    train, held_out = subject.images(*paths)
    features = brought_to(subject.network.device, train.features, held_out.features)
    with bar("training", "steps") as update:
        result = linear(*features, training, update)
    nearest = knn(*features, k=min(20, len(train.features)))
    show_table(
        f"{task} with {subject.network.title}",
        ("", "top-1 %", "top-5 %", "train images", "test images"),
        [
            ("linear", result.top1, result.top5, result.num_train, result.num_test),
            ("k-NN", nearest.top1, nearest.top5, nearest.num_train, nearest.num_test),
        ],
    )
    subject.write(f"transfer-{task}", *paths, {**result.to_json(), "knn": nearest.to_json()})
