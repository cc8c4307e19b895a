"""Patch targets in the store: what is stored is what the teacher's map says, killed or not, and without them nothing changes."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from rob.common.errors import MisuseError
from rob.common.images.beton import Beton
from rob.common.patches import feature_map
from rob.common.store.patches import PatchChoice
from rob.common.store.reader import TargetStore
from rob.common.views.loader import LoaderConfig, ViewLoader, ViewSet
from rob.teacher_cache import patches
from rob.teacher_cache.cache import CacheProgress, cache_teacher
from rob.teacher_cache.config import VerifyConfig
from rob.teacher_cache.teachers import Teacher, load_teacher
from rob.teacher_cache.verify import verify
from support import tiny

pytestmark = pytest.mark.usefixtures("small_chunks")
LOADER = LoaderConfig("torch", batch_size=4, workers=1)
SIZE = 64
"""Pixels of a view: maps of 2 x 2 of the tiny CNN, which reduces 32-fold."""


def config_of(out, data, teacher, choice, **changes):
    settings = {"view_size": SIZE, "loader": LOADER, "patches": choice}
    return tiny.tiny_cache_config(out, data, teacher, **(settings | changes))


def maps_of(data: Beton, config, teacher: Teacher) -> torch.Tensor:
    """(N, V, C, h, w), by timm alone."""
    recipe, backbone = config.recipe, teacher.backbone
    loader = ViewLoader(data, recipe, config.seed, LOADER)
    views = ViewSet(tuple(range(config.views)), SIZE)
    mean, std = torch.tensor(teacher.mean), torch.tensor(teacher.std)
    found = []
    with torch.no_grad():
        for batch in loader.epoch(np.arange(data.num_images), [views]):
            images = batch.augment(0, SIZE / recipe.global_crops[0].size, mean, std)
            found.append(backbone.forward_features(images.flatten(0, 1)).unflatten(0, images.shape[:2]).clone())
    return torch.cat(found)


def test_a_grid_is_the_teachers_map_within_a_step_of_int8(data, headless, tmp_path):
    config = config_of(tmp_path / "a.zarr", data, headless, PatchChoice("grid", patch_dim=0))
    notes, plans = [], []
    cache_teacher(config, CacheProgress(note=notes.append, plan=plans.append))
    store = TargetStore.open(config.out)
    decoded = store.decode(store.read(0, 40))["patches_embedding"]
    expected = maps_of(data, config, load_teacher(headless)).flatten(3).mT
    assert decoded.shape == expected.shape == (40, 2, 4, 256)
    step = expected.abs().amax(-1, keepdim=True) / 127
    assert ((decoded - expected).abs() <= 0.57 * step + 1e-5).all()
    assert "has no patch tokens: its last feature map, 2 x 2, stands for them" in notes[0]
    assert plans[0].patch_bytes_per_view == 4 * (256 + 2)
    assert plans[0].bytes_per_view == plans[0].patch_bytes_per_view + 2 * 256
    assert verify(VerifyConfig(config.out, data.path, headless, device="cpu", tolerance=1e-3)).lowest_cosine > 0.999


def test_the_pooled_targets_beside_patches_are_those_without(data, headless, tmp_path):
    config = config_of(tmp_path / "a.zarr", data, headless, PatchChoice())
    cache_teacher(config)
    cache_teacher(replace(config, out=tmp_path / "b.zarr", patches=PatchChoice("grid", patch_dim=8)))
    plain, dense = TargetStore.open(config.out), TargetStore.open(tmp_path / "b.zarr")
    assert not any(name.startswith("patch") for name in tiny.contents(config.out))
    assert "patches" not in plain.manifest.to_json()
    np.testing.assert_allclose(plain.read(0, 40)["embedding"], dense.read(0, 40)["embedding"], atol=1e-3)
    assert dense.pooled().read(0, 9).keys() == {"embedding"}
    assert dense.pooled().chunk_bytes == plain.chunk_bytes < dense.chunk_bytes


def test_a_pca_keeps_the_largest_components(data, headless, tmp_path):
    config = config_of(tmp_path / "a.zarr", data, headless, PatchChoice("grid", patch_grid=1, patch_dim=5))
    notes = []
    cache_teacher(config, CacheProgress(note=notes.append))
    store = TargetStore.open(config.out)
    basis, mean = store.statistics["patch_basis"], store.statistics["patch_mean"]
    maps = maps_of(data, config, load_teacher(headless)).mean((3, 4))
    tokens = maps[:, 0].double().numpy()  # what it was fitted to
    _, variances, rows = np.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs((basis * rows[:5]).sum(1)), 1, atol=1e-4)
    np.testing.assert_allclose(
        store.statistics["patch_variance"], (variances[:5] ** 2).sum() / (variances**2).sum(), atol=1e-4
    )
    expected = (maps.numpy() - mean) @ basis.T
    stored = store.decode(store.read(0, 40))["patches_embedding"][:, :, 0].numpy()
    np.testing.assert_allclose(stored, expected, atol=np.abs(expected).max() / 100)
    assert any("5 of 256 components keep" in note for note in notes)


@pytest.mark.parametrize("kind", ["prototypes", "embedding"])
def test_patches_against_the_teachers_prototypes(data, with_head, tmp_path, kind):
    choice = PatchChoice(kind, patch_topk=6 if kind == "prototypes" else None)
    config = config_of(tmp_path / "a.zarr", data, with_head, choice)
    cache_teacher(config)
    store, teacher = TargetStore.open(config.out), load_teacher(with_head)
    rows = maps_of(data, config, teacher).flatten(3).mT
    with torch.no_grad():
        projected = F.normalize(teacher.head.mlp(rows), dim=-1)
    found = store.decode(store.read(0, 40))
    if kind == "embedding":
        torch.testing.assert_close(found["patches_embedding"], projected, atol=0.01, rtol=0)
    else:
        largest = (projected @ teacher.prototypes.T).topk(6, -1)
        torch.testing.assert_close(found["patches_logits"], largest.values, atol=2e-3, rtol=0)
        assert (found["patches_ids"] == largest.indices).float().mean() > 0.95
        assert found["patches_tail"].shape == (40, 2, 4, 2)
    verify(VerifyConfig(config.out, data.path, with_head, device="cpu", tolerance=1e-3))


def test_killed_and_gone_on_with_it_is_the_same_store(data, headless, tmp_path, monkeypatch):
    config = config_of(tmp_path / "whole.zarr", data, headless, PatchChoice("grid", patch_dim=8))
    cache_teacher(config)
    killed = replace(config, out=tmp_path / "killed.zarr")

    def stop(done, total):
        if done == 24:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_teacher(killed, CacheProgress(rows=stop))
    with pytest.raises(MisuseError, match=r"was begun with other settings \(patches is .* in the store, not None\)"):
        cache_teacher(replace(killed, patches=PatchChoice("none")))
    monkeypatch.setattr(patches, "fit_pca", None)  # found where the first run left it
    cache_teacher(replace(killed, patches=PatchChoice()))  # as it began
    with pytest.raises(MisuseError, match=r"complete, with other settings \(patches is .* in the store, not None\)"):
        cache_teacher(replace(killed, patches=PatchChoice("none")))
    assert tiny.contents(killed.out) == tiny.contents(config.out)


def test_what_nobody_asked_for_is_cached_where_it_is_cheap(data, headless, with_head, tmp_path, monkeypatch):
    """The tiny CNN has 7 x 7 positions at 224 px, and its PCA wants more tokens than 40 images of 2 x 2 have."""
    monkeypatch.setattr(patches, "USUAL_GRID", 2)
    few_numbers = {"patch_dim": 24}
    monkeypatch.setattr(patches, "PatchChoice", lambda kind: PatchChoice(kind, **few_numbers))

    def cached(name, teacher=headless, **changes):
        notes: list[str] = []
        config = config_of(tmp_path / name, data, teacher, PatchChoice(), **changes)
        return cache_teacher(config, CacheProgress(note=notes.append)).patch_encoding, " ".join(notes)

    encoding, notes = cached("usual.zarr")
    assert encoding is not None
    assert (encoding.kind, encoding.grid) == ("grid", 2)
    assert "`patches` none leaves them out" in notes
    assert cached("usual.zarr") == (encoding, f"{tmp_path / 'usual.zarr'} is complete already: nothing to do")
    assert cached("head.zarr", with_head)[0] is None
    assert cached("fitted.zarr", prototypes=6)[0] is None
    assert cached("small_map.zarr", view_size=32)[0] is None
    few_numbers["patch_dim"] = 200
    assert cached("few_images.zarr")[0] is None
    few_numbers["patch_dim"] = 24
    monkeypatch.setattr(patches, "AUTO_BYTES", data.num_images * 2 * encoding.bytes_per_view - 1)
    without, notes = cached("dear.zarr")
    assert without is None
    assert "`patches` grid caches them" in notes
    monkeypatch.setattr(patches, "AUTO_BYTES", 10**9)
    assert cached("dear.zarr")[0] is None  # as it began


def test_fitted_prototypes_leave_the_patches_as_they_are(data, headless, tmp_path):
    config = config_of(tmp_path / "a.zarr", data, headless, PatchChoice("grid", patch_dim=8), prototypes=6)
    cache_teacher(config)
    logits = replace(config, out=tmp_path / "b.zarr", encoding=replace(config.encoding, kind="dense"))
    cache_teacher(logits)
    first, second = TargetStore.open(config.out), TargetStore.open(logits.out)
    np.testing.assert_array_equal(first.read(0, 40)["patches_embedding"], second.read(0, 40)["patches_embedding"])
    np.testing.assert_array_equal(first.statistics["patch_basis"], second.statistics["patch_basis"])


def test_the_map_of_a_vit_is_its_patch_tokens():
    vit = timm.create_model("test_vit", num_classes=0, img_size=64, dynamic_img_size=True).eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    teacher = Teacher("tiny", vit, view_size=64)
    embedding, features = teacher.with_map(images)
    torch.testing.assert_close(embedding, teacher(images))
    tokens = vit.forward_features(images)[:, vit.num_prefix_tokens :]
    torch.testing.assert_close(features[1, :, 2, 3], tokens[1, 2 * 4 + 3])


def test_a_network_of_several_maps_has_none():
    """As crossvit's ``forward_features``: caching such a teacher goes without patches."""
    with pytest.raises(MisuseError, match="the network gives no square map of features"):
        feature_map(torch.nn.Identity(), [torch.zeros(1, 3, 7, 7)])


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ({"patches": "grid", "patch_grid": 3}, "`patch_grid` 3 is more than the 2 x 2 patches"),
        ({"patches": "grid", "patch_dim": 300}, "`patch_dim` 300 is more than the 256 numbers of a token"),
        (
            {"patches": "grid", "patch_dim": 200},
            "`patch_dim` 200 is more components than can be found in 160 patch tokens",
        ),
        ({"patches": "prototypes"}, "`patches` prototypes is for a teacher with prototypes of its own"),
        (
            {"patch_dim": 8},
            "`patch_dim` is for `patches` grid, and it is auto: leave `patch_dim` out, or give `patches` grid",
        ),
        ({"patches": "embedding", "patch_topk": 8}, "`patch_topk` is for `patches` prototypes, and it is embedding"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(data, headless, tmp_path, choice, sentence):
    with pytest.raises(MisuseError, match=sentence):
        cache_teacher(config_of(tmp_path / "a.zarr", data, headless, PatchChoice(**choice)))
    assert not (tmp_path / "a.zarr").exists()
