"""The neighbours behind a contact sheet."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rob.common.look.neighbours import nearest
from rob.common.store.codec import decode
from rob.common.store.encodings import Encoding
from support.stores import reencoded

ENCODINGS = [Encoding("embedding"), Encoding("embedding", "int8"), Encoding("topk", k=8), Encoding("dense")]


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: f"{e.kind} {e.dtype}")
def test_neighbours_are_those_of_all_pairs(store, tmp_path, encoding) -> None:
    store = reencoded(store, tmp_path / "a.zarr", encoding)
    queries = np.array([3, 0, 20])
    found = nearest(store, queries, 2, [0, 2, 3], count=5)

    decoded = decode(store.encoding, store.read(0, 24))
    if encoding.kind == "topk":
        vectors = torch.zeros(24, 2, 40).scatter(2, decoded["ids"], decoded["logits"])
    else:
        vectors = decoded["embedding" if encoding.kind == "embedding" else "logits"]
    vectors = F.normalize(vectors, dim=2)
    searched = [row for row in range(24) if row // 7 in (0, 2, 3)]
    for q, image_id in enumerate(queries):
        for column in range(2):
            cosines = vectors @ vectors[image_id, column]
            others = sorted((row for row in searched if row != image_id), key=lambda row: -cosines[row].max())[:5]
            assert found.image_ids[q, column].tolist() == others
            np.testing.assert_allclose(found.cosines[q, column], [cosines[row].max() for row in others], atol=1e-5)
            assert found.columns[q, column].tolist() == [cosines[row].argmax() for row in others]


def test_fewer_neighbours_than_asked_are_marked(store) -> None:
    found = nearest(store, np.array([0]), 1, [0], count=30)
    assert np.isfinite(found.cosines).sum() == 23
    assert np.isneginf(found.cosines[0, 0, 23:]).all()
