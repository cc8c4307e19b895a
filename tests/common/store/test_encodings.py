"""What the store keeps of a target, and how much of the target survives."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rob.benchmarks.fidelity import fidelity, restored
from rob.common.errors import FailureError, MisuseError
from rob.common.store.codec import decode, encode
from rob.common.store.encodings import LADDER, Encoding, check_temperature
from rob.student_train.kernels.reference import target_probabilities
from rob.student_train.kernels.topk import log_tail

ENCODINGS = [
    Encoding("embedding", "float32"),
    Encoding("embedding", "float16"),
    Encoding("embedding", "int8"),
    Encoding("topk", k=16),
    Encoding("dense"),
]


def unit_rows(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda encoding: f"{encoding.kind}-{encoding.dtype}")
def test_encoded_arrays_follow_the_layout(encoding):
    embedding, prototypes = unit_rows(6, 3, 32), unit_rows(100, 32, seed=1)
    arrays = encode(encoding, embedding, embedding @ prototypes.T)
    layout = encoding.layout(dim=32, num_prototypes=100)
    assert {name: (values.shape[2:], values.dtype.name) for name, values in arrays.items()} == layout
    assert all(values.shape[:2] == (6, 3) for values in arrays.values())
    assert encoding.bytes_per_view(32, 100) == sum(values[0, 0].nbytes for values in arrays.values())
    assert Encoding.from_dict(encoding.to_dict()) == encoding


def test_the_budgets_of_bytes_hold_before_compression():
    assert Encoding("embedding", "int8").bytes_per_view(256, 65536) <= 264
    assert Encoding("topk", k=64).bytes_per_view(256, 65536) <= 280


@given(st.integers(1, 300), st.integers(0, 100), st.floats(0.01, 100))
def test_int8_is_within_half_a_step(dim, seed, size):
    embedding = unit_rows(2, 2, dim, seed=seed) * size
    encoding = Encoding("embedding", "int8")
    arrays = encode(encoding, embedding)
    restored = decode(encoding, arrays)["embedding"]
    step = torch.as_tensor(arrays["scale"]).float()[..., None]
    assert (abs(arrays["embedding"].astype(int)).max(-1) >= 126).all()  # the whole range is used
    # Half a step; where rounding the scale down leaves the largest value past 127 steps, a sixteenth of a step more.
    assert ((restored - embedding).abs() <= 0.5625 * step).all()


@given(st.sampled_from(["float16", "float32"]), st.integers(1, 64))
def test_float_embeddings_round_once(dtype, dim):
    embedding = unit_rows(2, 2, dim)
    encoding = Encoding("embedding", dtype)
    restored = decode(encoding, encode(encoding, embedding))["embedding"]
    assert torch.equal(restored, embedding.to(getattr(torch, dtype)).float())


@given(st.integers(1, 200), st.integers(1, 80), st.sampled_from(LADDER))
def test_topk_keeps_the_largest_and_the_rest_as_a_tail(num_prototypes, k, temp):
    logits = unit_rows(2, 2, num_prototypes)
    encoding = Encoding("topk", k=k)
    decoded = decode(encoding, encode(encoding, None, logits))
    kept = min(k, num_prototypes)
    assert decoded["ids"].dtype == torch.int64
    torch.testing.assert_close(decoded["logits"], logits.gather(-1, decoded["ids"]), atol=5e-4, rtol=0)
    torch.testing.assert_close(
        decoded["logits"], logits.sort(-1, descending=True).values[..., :kept], atol=5e-4, rtol=0
    )
    tail = decoded["tail"][..., LADDER.index(temp)]
    rest = logits.double().sort(-1).values[..., : num_prototypes - kept]
    torch.testing.assert_close(tail.double(), torch.logsumexp(rest / temp, -1), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("num_prototypes", [1, 64, 65536, 65537])
def test_topk_ids_survive_at_the_limits_of_their_type(num_prototypes):
    logits = torch.zeros(1, 1, num_prototypes)
    logits[..., -1] = 1
    encoding = Encoding("topk", k=2)
    arrays = encode(encoding, None, logits)
    assert arrays["ids"].dtype == (np.uint16 if num_prototypes <= 65536 else np.uint32)
    assert decode(encoding, arrays)["ids"][0, 0, 0] == num_prototypes - 1


@given(st.floats(min(LADDER), max(LADDER)), st.integers(0, 50))
def test_the_tail_between_the_ladder_is_close(temp, seed):
    embedding, prototypes = unit_rows(4, 1, 64, seed=seed), unit_rows(500, 64, seed=seed + 1)
    target = restored(Encoding("topk", k=32), embedding, prototypes)
    rest = (embedding @ prototypes.T).scatter(-1, target.ids, -torch.inf)
    torch.testing.assert_close(log_tail(target, temp), torch.logsumexp(rest / temp, -1), atol=2e-2, rtol=0)


def test_a_temperature_off_the_ladder_is_refused():
    for temp in LADDER:
        check_temperature(LADDER, temp)
    for temp in (0.01, 0.2):
        with pytest.raises(MisuseError, match=r"outside of the store's ladder 0\.025 to 0\.1: .* `encoding` embedding"):
            check_temperature(LADDER, temp)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda encoding: f"{encoding.kind}-{encoding.dtype}")
def test_stored_targets_are_distributions(encoding):
    embedding, prototypes = unit_rows(5, 2, 32), unit_rows(200, 32, seed=1)
    for temp in (0.04, 0.06):
        q = target_probabilities(restored(encoding, embedding, prototypes), temp)
        full = torch.softmax(embedding @ prototypes.T / temp, dim=-1)
        torch.testing.assert_close(q.sum(-1), torch.ones(5, 2), atol=2e-3, rtol=0)
        assert (q - full).abs().sum(-1).max() < 0.5  # the top k of 200 at least


def test_fidelity_orders_the_encodings():
    embedding, prototypes = unit_rows(64, 2, 128), unit_rows(1000, 128, seed=1)
    measured = {
        name: fidelity(encoding, embedding, prototypes)
        for name, encoding in {
            "fp32": Encoding("embedding", "float32"),
            "fp16": Encoding("embedding", "float16"),
            "int8": Encoding("embedding", "int8"),
            "top256": Encoding("topk", k=256),
            "top64": Encoding("topk", k=64),
        }.items()
    }
    kl = {name: values["kl_0.04"] for name, values in measured.items()}
    assert abs(kl["fp32"]) < 1e-6
    assert kl["fp16"] < kl["int8"] < 2e-3
    assert kl["int8"] < kl["top256"] < kl["top64"]
    assert all(values["top1_agreement"] > 0.97 for values in measured.values())


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda encoding: f"{encoding.kind}-{encoding.dtype}")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_teacher_is_a_failure(encoding, bad):
    embedding, logits = unit_rows(2, 2, 32), unit_rows(2, 2, 50)
    embedding[1, 1, 3] = logits[1, 1, 3] = bad
    with pytest.raises(FailureError, match="NaN, infinite, or too large"):
        encode(encoding, embedding, logits)


def test_unknown_settings_are_misuse():
    for settings, message in (
        ({"kind": "top"}, "unknown encoding 'top'"),
        ({"kind": "embedding", "dtype": "int4"}, "unknown store dtype 'int4'"),
        ({"kind": "topk", "k": 0}, "`k` is 0, expected at least 1"),
        ({"kind": "topk", "temps": (0.04, 0.04)}, "the ladder of temperatures must be distinct and positive"),
    ):
        with pytest.raises(MisuseError, match=message):
            Encoding(**settings)
