"""The losses of patches against their formulas, written plainly in float64, and against iBOT's released criterion."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rob.common.errors import MisuseError
from rob.common.views.drawing import LOCAL
from rob.common.views.recipes import get_recipe
from rob.student_train.kernels import EmbeddingTarget, TopKTarget
from rob.student_train.objectives import ObjectiveConfig, StudentMap, build_objective
from rob.student_train.student_with_head import StudentWithHead, hiding
from rob.student_train.students import StudentConfig, build_student
from rob.student_train.targets.dense import Placement, Regions, TargetWithPatches
from rob.student_train.targets.space import PatchSpace, TargetSpace
from rob.student_train.targets.view_plan import ViewPlan

B, G, D, K, C, WIDTH, GRID = 5, 2, 8, 12, 6, 10, 4
PLAN = ViewPlan((0, 1), (0, 1), (LOCAL, LOCAL + 1), torch.full((4, 2), 0.125, dtype=torch.float64), epoch=3)
SIZES = np.full(B, 64)
PLACEMENT = Placement(np.arange(B), SIZES, SIZES, PLAN, get_recipe("dino"), 0)


def rows(*shape: int, seed: int, unit: bool = False) -> Tensor:
    found = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(found, dim=-1) if unit else found


def built(name: str, space: PatchSpace, side: int, tokens: bool = True, **settings):
    torch.manual_seed(1)
    config = ObjectiveConfig(name, hidden_dim=16, **settings)
    whole = TargetSpace(D, 0 if name == "patch" else K, True, None if name == "patch" else 0.07, patches=space)
    objective = build_objective(config, WIDTH, whole, student_map=StudentMap(WIDTH, side, tokens)).double().train()
    for parameter in objective.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return objective


# ==== patch ====


def plain_patch_loss(said: Tensor, wanted: Tensor) -> float:
    """Of one position: two vectors."""
    cosine = float(said @ wanted) / math.sqrt(float(said @ said) * float(wanted @ wanted))
    smooth = [0.5 * d * d if abs(d) < 1 else abs(d) - 0.5 for d in (said - wanted).tolist()]
    return 0.9 * (1 - cosine) + 0.1 * sum(smooth) / len(smooth)


@pytest.mark.parametrize("standardise", [None, True])
@pytest.mark.parametrize("side", [8, 2])
def test_patch_is_its_formula(standardise, side):
    objective = built("patch", PatchSpace("grid", GRID, C), side, patch_standardise=standardise, patch_weight=0.3)
    features, tokens = rows(B, G, WIDTH, seed=2), rows(B, G * GRID * GRID, C, seed=3)
    maps, pooled = rows(B, G, WIDTH, side, side, seed=4), EmbeddingTarget(rows(B, G, D, seed=5, unit=True))
    target = TargetWithPatches(pooled, EmbeddingTarget(tokens), PLACEMENT)
    weights = torch.eye(2, dtype=torch.float64) / 2
    found = objective.with_patches(features, [maps], None, target, weights)

    weight, bias = objective.projector.weight, objective.projector.bias
    said = torch.einsum("bnchw,dc->bnhwd", maps, weight) + bias
    total = 0.0
    for b in range(B):
        for g in range(G):
            for row in range(GRID):
                for column in range(GRID):
                    wanted = tokens[b, g * GRID * GRID + row * GRID + column]
                    if standardise:
                        wanted = (wanted - wanted.mean()) / torch.sqrt(wanted.var(correction=0) + 1e-6)
                    if side > GRID:  # the mean of 2 x 2
                        mine = said[b, g, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((0, 1))
                    else:  # between the middles of 2 x 2, the nearest beyond them
                        y, x = (min(max((at + 0.5) / 2 - 0.5, 0), 1) for at in (row, column))
                        top = (1 - x) * said[b, g, 0, 0] + x * said[b, g, 0, 1]
                        mine = (1 - y) * top + y * ((1 - x) * said[b, g, 1, 0] + x * said[b, g, 1, 1])
                    total += plain_patch_loss(mine.detach(), wanted)
    expected = objective(features, pooled, weights).item() + 0.3 * total / (B * G * GRID * GRID)
    assert abs(found.item() - expected) < 1e-10


def test_patch_of_regions_is_the_mean_over_pairs_of_what_they_share(monkeypatch):
    """Boxes on the borders of cells: each position of a local crop is then one of them."""
    objective = built("patch", PatchSpace("grid", GRID, C), 4, patch_from_region=True)
    boxes = torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64).expand(B, 2, G, 4).clone()
    boxes[:, 0, 0] += 0.5  # below the target
    boxes[:, 1, 1] += 2.0  # beside it and below
    mirrored = torch.zeros(B, 2, G, dtype=torch.bool)
    mirrored[:, 1] = True
    monkeypatch.setattr(Placement, "regions", lambda self: Regions(boxes, mirrored))
    tokens = rows(B, G * GRID * GRID, C, seed=3)
    maps = [rows(B, G, WIDTH, 4, 4, seed=4), rows(B, 2, WIDTH, 2, 2, seed=6)]
    target = TargetWithPatches(EmbeddingTarget(rows(B, G, D, seed=5, unit=True)), EmbeddingTarget(tokens), PLACEMENT)
    found = objective.patch_loss(maps, None, target)

    said = [torch.einsum("bnchw,dc->bnhwd", one, objective.projector.weight) + objective.projector.bias for one in maps]
    grid = tokens.view(B, G, GRID, GRID, C)
    pairs = []
    for b in range(B):
        for g in range(G):
            at_all = [
                plain_patch_loss(said[0][b, g, r, c].detach(), grid[b, g, r, c]) for r in range(4) for c in range(4)
            ]
            pairs.append(sum(at_all) / 16)
        for local, g in ((0, 1), (1, 0)):  # the others have nothing in common
            at_all = [
                plain_patch_loss(said[1][b, local, r, c].detach(), smoothed(grid[b, g], r, c, local == 1))
                for r in range(2)
                for c in range(2)
            ]
            pairs.append(sum(at_all) / 4)
    assert abs(found.item() - sum(pairs) / len(pairs)) < 1e-10


def test_local_crops_that_share_nothing_with_a_target_cost_nothing(monkeypatch):
    objective = built("patch", PatchSpace("grid", GRID, C), 4, patch_from_region=True)
    beside = torch.tensor([2.25, 0.5, 2.75, 1.0], dtype=torch.float64).expand(B, 2, G, 4)
    regions = Regions(beside, torch.zeros(B, 2, G, dtype=torch.bool))
    monkeypatch.setattr(Placement, "regions", lambda self: regions)
    monkeypatch.setattr(ViewPlan, "num_replayed", 0)
    maps = [rows(B, G, WIDTH, 4, 4, seed=4), rows(B, 2, WIDTH, 2, 2, seed=6)]
    pooled = EmbeddingTarget(rows(B, G, D, seed=5, unit=True))
    target = TargetWithPatches(pooled, EmbeddingTarget(rows(B, G * GRID * GRID, C, seed=3)), PLACEMENT)
    assert objective.patch_loss(maps, None, target) == 0


def smoothed(grid: Tensor, row: int, column: int, mirrored: bool) -> Tensor:
    """The mean of four samples of the cell (2 + row, 1 + column), at a quarter of it from its borders."""
    column = 1 - column if mirrored else column
    total = torch.zeros(grid.shape[-1], dtype=torch.float64)
    for dy in (0.25, 0.75):
        for dx in (0.25, 0.75):
            y, x = min(2 + row + dy - 0.5, GRID - 1), 1 + column + dx - 0.5
            top, left = int(y), int(x)
            below = min(top + 1, GRID - 1)
            a, b = y - top, x - left
            total += (1 - a) * ((1 - b) * grid[top, left] + b * grid[top, left + 1])
            total += a * ((1 - b) * grid[below, left] + b * grid[below, left + 1])
    return total / 4


# ==== ibot ====


def released(student_patch: Tensor, teacher_patch: Tensor, mask: Tensor, centre: Tensor) -> Tensor:
    """The patch half of iBOTLoss (bytedance/ibot, main_ibot.py) of logits (B, G, P, K), with its names: lambda 1, views alike."""
    total_loss2, n_loss_terms2 = torch.zeros((), dtype=torch.float64), 0
    for q in range(G):
        teacher_patch_c = F.softmax((teacher_patch[:, q] - centre) / 0.07, dim=-1)
        loss2 = torch.sum(-teacher_patch_c * F.log_softmax(student_patch[:, q] / 0.1, dim=-1), dim=-1)
        loss2 = torch.sum(loss2 * mask[:, q].double(), dim=-1) / mask[:, q].sum(dim=-1).clamp(min=1.0)
        total_loss2 += loss2.mean()
        n_loss_terms2 += 1
    return total_loss2 / n_loss_terms2


@pytest.mark.parametrize("centre", ["none", "running"])
@pytest.mark.parametrize(("head", "norm"), [("projection", False), ("projection", True), ("mlp", False)])
def test_ibot_is_the_released_criterion(centre, head, norm):
    settings = {"bottleneck": D} if head == "projection" else {}
    objective = built(
        "ibot",
        PatchSpace("embedding", GRID, D, K),
        GRID,
        centre_targets=centre,
        head_type=head,
        head_norm=norm,
        **settings,
    )
    features, maps = rows(B, G, WIDTH, seed=2), rows(B, G, WIDTH, GRID, GRID, seed=4)
    prototypes = rows(K, D, seed=7, unit=True)
    pooled = EmbeddingTarget(rows(B, G, D, seed=5, unit=True), prototypes)
    patches = EmbeddingTarget(rows(B, G * GRID * GRID, D, seed=6, unit=True), prototypes)
    hidden = objective.hidden_patches(PLACEMENT)
    assert hidden.shape == (B, G, GRID, GRID)
    assert 0 < hidden.double().mean() < 0.5
    weights = torch.eye(2, dtype=torch.float64) / 2
    target = TargetWithPatches(pooled, patches, PLACEMENT)
    class_token = objective(features, pooled, weights)  # a running centre moves on by this and the next
    kept = torch.zeros(K, dtype=torch.float64)
    for _ in range(2):
        found = objective.patch_loss([maps], hidden, target)
        said = objective.head(maps.flatten(3).mT.flatten(0, 2))
        logits = said @ objective.prototypes.matrix().T + (
            0 if objective.prototypes.bias is None else objective.prototypes.bias
        )
        of_teacher = (patches.embedding @ prototypes.T).view(B, G, -1, K)
        expected = released(logits.view(B, G, -1, K), of_teacher, hidden.flatten(2), kept)
        assert abs(found.item() - expected.item()) < 1e-10
        if centre == "running":
            kept = 0.9 * kept + 0.1 * of_teacher.mean((0, 1, 2))
    assert class_token.isfinite()
    for mine, theirs in zip(
        torch.autograd.grad(found, [*objective.head.parameters()], retain_graph=True),
        torch.autograd.grad(expected, [*objective.head.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    seen = objective.patch_loss([maps], torch.zeros_like(hidden), target)
    assert seen.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(seen, [*objective.head.parameters()]))
    objective.centres[0].centre = None if centre == "none" else torch.zeros(K, dtype=torch.float64)
    both = objective.with_patches(features, [maps], hidden, target, weights)
    assert both.item() > class_token.item()


def released_whole(student_cls, teacher_cls, student_patch, teacher_patch, mask, center, center2):
    """iBOTLoss whole, as it trains without a frozen teacher: class tokens of all V crops, patches of the global ones."""
    total_loss1, n_loss_terms1 = torch.zeros((), dtype=torch.float64), 0
    for q in range(G):
        teacher_cls_c = F.softmax((teacher_cls[:, q] - center) / 0.07, dim=-1)
        for v in range(student_cls.shape[1]):
            if v != q:
                loss1 = torch.sum(-teacher_cls_c * F.log_softmax(student_cls[:, v] / 0.1, dim=-1), dim=-1)
                total_loss1 += loss1.mean()
                n_loss_terms1 += 1
    center = center * 0.9 + teacher_cls.flatten(0, 1).mean(0) * (1 - 0.9)
    moved2 = center2 * 0.9 + teacher_patch.flatten(0, 1).mean(1).mean(0) * (1 - 0.9)
    return total_loss1 / n_loss_terms1 + released(student_patch, teacher_patch, mask, center2), center, moved2


def test_ibot_without_a_teacher_is_the_released_criterion_with_both_centres():
    """Three steps, the last of them by an objective that goes on from the state of the one before."""
    locals_, space = 2, PatchSpace("student", 0, 0, K)

    def begin():
        torch.manual_seed(1)
        config = ObjectiveConfig("ibot", hidden_dim=16, bottleneck=D, head_norm=False)
        whole = TargetSpace(D, K, True, 0.07, usual_centre="running", of_student=True, patches=space)
        return build_objective(config, WIDTH, whole, student_map=StudentMap(WIDTH, GRID, True)).double().train()

    objective = begin()
    weights = torch.ones(G + locals_, G, dtype=torch.float64)
    weights[:G].fill_diagonal_(0)
    weights /= weights.sum()
    prototypes, hidden = rows(K, D, seed=7, unit=True), objective.hidden_patches(PLACEMENT)
    center = center2 = torch.zeros(K, dtype=torch.float64)
    for step in range(3):
        if step == 2:
            state, objective = objective.state_dict(), begin()
            objective.load_state_dict(state)
        features = rows(B, G + locals_, WIDTH, seed=10 + step)
        maps = [rows(B, n, WIDTH, GRID, GRID, seed=20 + step + n) for n in (G, locals_)]
        pooled = rows(B, G, D, seed=30 + step, unit=True)
        patches = rows(B, G * GRID * GRID, D, seed=40 + step, unit=True)
        target = TargetWithPatches(EmbeddingTarget(pooled, prototypes), EmbeddingTarget(patches, prototypes), PLACEMENT)
        found = objective.with_patches(features, maps, hidden, target, weights)
        student_cls, student_patch = (
            objective.head(x.flatten(0, -2)).unflatten(0, x.shape[:-1]) @ objective.prototypes.matrix().T
            for x in (features, maps[0].flatten(3).mT)
        )
        expected, center, center2 = released_whole(
            student_cls,
            pooled @ prototypes.T,
            student_patch,
            (patches @ prototypes.T).unflatten(1, (G, -1)),
            hidden.flatten(2),
            center,
            center2,
        )
        assert abs(found.item() - expected.item()) < 1e-10
    assert (center - center2).abs().max() > 0.01
    torch.testing.assert_close(objective.patch_centre.centre, center2, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("chosen", "given"), [("checkpoint", True), ("none", False), ("calibration", False)])
def test_the_patches_centre_of_the_teachers_file_is_theirs_alone(chosen, given):
    centre, of_patches = rows(K, seed=8), rows(K, seed=9)
    patches = PatchSpace("embedding", GRID, D, K, centre=of_patches)
    space = TargetSpace(D, K, True, 0.07, centre=centre, mean_logits=centre, patches=patches)
    config = ObjectiveConfig("ibot", hidden_dim=16, bottleneck=D, head_norm=False, centre_targets=chosen)
    objective = build_objective(config, WIDTH, space, student_map=StudentMap(WIDTH, GRID, True))
    assert objective.patch_centre.centre is (of_patches if given else None)
    assert "patch_centre.centre" not in objective.state_dict()


def test_all_kept_logits_of_a_patch_are_its_embedding():
    """Top k of all K prototypes and embeddings say the same."""
    objective = built("ibot", PatchSpace("prototypes", GRID, D, K), GRID, bottleneck=D, head_norm=False)
    maps, prototypes = rows(B, G, WIDTH, GRID, GRID, seed=4), rows(K, D, seed=7, unit=True)
    pooled = EmbeddingTarget(rows(B, G, D, seed=5, unit=True), prototypes)
    embedding = rows(B, G * GRID * GRID, D, seed=6, unit=True)
    logits, ids = (embedding @ prototypes.T).topk(K, dim=-1)
    topk = TopKTarget(ids, logits, logits[..., :2], (0.04, 0.07), K)
    hidden = objective.hidden_patches(PLACEMENT)
    found = [
        objective.patch_loss([maps], hidden, TargetWithPatches(pooled, patches, PLACEMENT)).item()
        for patches in (topk, EmbeddingTarget(embedding, prototypes))
    ]
    assert abs(found[0] - found[1]) < 1e-10


def test_a_hidden_patch_is_not_seen():
    torch.manual_seed(0)
    vit = build_student(StudentConfig("test_vit", 32, small_images=True)).eval()
    images = torch.randn(2, 3, 32, 32)
    hidden = torch.zeros(2, 8, 8, dtype=torch.bool)
    hidden[1, 3, 5] = True
    other = images.clone()
    other[1, :, 12:16, 20:24] += 1  # what is under that patch
    token = torch.ones(1, vit.num_features)
    with torch.no_grad(), hiding(vit, hidden, token):
        assert torch.equal(vit(images), vit(other))
    with torch.no_grad():
        assert not torch.equal(vit(images)[1], vit(other)[1])


@pytest.mark.parametrize(
    ("name", "space", "tokens", "side", "sentence"),
    [
        (
            "ibot",
            PatchSpace("grid", GRID, C),
            True,
            GRID,
            "`objective` ibot reads prototypes of patches, and the store has `patches` grid",
        ),
        (
            "ibot",
            PatchSpace("embedding", GRID, D, K),
            False,
            GRID,
            "`objective` ibot hides patches from the student, as a ViT",
        ),
        (
            "ibot",
            PatchSpace("embedding", GRID, D, K),
            True,
            8,
            "the student has 8 x 8 of them where the targets have 4 x 4",
        ),
        ("ibot", PatchSpace("embedding", GRID, D, 30), True, GRID, "the teacher 30 prototypes of patches beside 12"),
        ("ibot", PatchSpace("prototypes", GRID, D, K), True, GRID, "running needs all logits of a patch"),
        ("ibot", PatchSpace("prototypes", GRID, D, K, (0.1, 0.2)), True, GRID, "again with `patches` embedding"),
        (
            "patch",
            PatchSpace("embedding", GRID, D, K),
            True,
            GRID,
            "`objective` patch compares patch tokens, and these are `patches` emb",
        ),
        ("patch", None, True, GRID, "`objective` patch compares patch tokens, and these are targets without patches"),
    ],
)
def test_targets_that_do_not_serve_are_refused(name, space, tokens, side, sentence):
    with pytest.raises(MisuseError, match=sentence):
        built(name, space, side, tokens, centre_targets="running" if space and space.kind == "prototypes" else None)


def test_a_centre_is_not_taken_off_logits_that_were_chosen_without_it():
    config = ObjectiveConfig("ibot", hidden_dim=16, centre_targets="checkpoint")
    for kind in ("embedding", "prototypes"):
        patches = PatchSpace(kind, GRID, D, K, centre=torch.ones(K))
        space = TargetSpace(D, K, True, 0.07, centre=torch.ones(K), patches=patches)
        refused = pytest.raises(MisuseError, match="`centre_targets` checkpoint takes the patches' centre off")
        with refused if kind == "prototypes" else nullcontext():
            build_objective(config, WIDTH, space, student_map=StudentMap(WIDTH, GRID, True))


def test_parts_are_the_whole_batch():
    """Maps and hidden patches go through in parts, and backward again, as the whole batch does."""
    images, prototypes = 4, rows(K, D, seed=7, unit=True)
    plan = ViewPlan((0, 1), (0, 1), (), torch.eye(2))
    target = TargetWithPatches(
        EmbeddingTarget(rows(images, G, D, seed=5, unit=True), prototypes),
        EmbeddingTarget(rows(images, G * 64, D, seed=6, unit=True), prototypes),
        Placement(np.arange(images), SIZES[:images], SIZES[:images], plan, get_recipe("dino"), 0),
    )
    found = []
    for parts in (1, 2):
        torch.manual_seed(0)
        backbone = build_student(StudentConfig("test_vit", 32, small_images=True))
        width: int = backbone.num_features  # type: ignore[assignment]
        space = TargetSpace(D, K, True, 0.07, patches=PatchSpace("embedding", 8, D, K))
        config = ObjectiveConfig("ibot", hidden_dim=16, bottleneck=D, head_norm=False)
        objective = build_objective(config, width, space, student_map=StudentMap(width, 8, True))
        model = StudentWithHead(backbone, objective, parts).double().train()
        loss = model([rows(images, G, 3, 32, 32, seed=9)], target, torch.eye(2).double() / 2)
        loss.backward()
        found.append([loss, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)])
        assert objective.mask_token is not None
        assert objective.mask_token.grad is not None
        assert objective.mask_token.grad.abs().max() > 0
    for whole, in_parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, in_parts, rtol=1e-9, atol=1e-12)
