"""The candidates by the native op: against scores in float64, against sorting with ties, and against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from detcore import UserError
from ssd300.ops.candidates import candidates, candidates_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = 5e-6
"""Largest relative error of a score. A GPU's exponential rounds x log2(e), at x = -25 by 1.8e-6 of the result, and is
off by 2.4e-7 itself, in the numerator and in the sum; the difference of the logits is rounded, too, by 1e-6 there."""


def outputs(images: int, count: int, classes: int, dtype=torch.float32, seed: int = 0, background: float = 2.0):
    """Logits [N, P, K + 1]; every later image has fewer scores above any threshold."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, count, classes + 1, generator=generator) * 2
    logits[..., 0] += background + 2 * torch.arange(images)[:, None]
    return logits.to(dtype)


def check(device, logits: Tensor, threshold: float, per_class: int) -> tuple[Tensor, Tensor]:
    """The op's results, which must be right by the scores in float64, to within the rounding of float32."""
    found = torch.ops.ssd300.candidates(logits.to(device), threshold, per_class)
    scores, priors = (x.cpu() for x in found)
    images, _, classes = logits.shape
    assert scores.shape == priors.shape == (images, classes - 1, per_class)
    assert scores.dtype == torch.float32 and priors.dtype == torch.int64
    exact = logits.double().softmax(2)[..., 1:].transpose(1, 2)
    live = scores >= 0
    filled = live.sum(2)
    assert torch.equal(live, torch.arange(per_class) < filled[..., None])  # the used places come first
    assert (scores[live] > threshold).all() and (scores[~live] == -1).all() and (priors[~live] == 0).all()
    assert ((priors[..., 1:] > priors[..., :-1]) | ~live[..., 1:]).all()
    own = exact.gather(2, priors)
    torch.testing.assert_close(scores.double()[live], own[live], rtol=ROUNDING, atol=0)
    least = (exact > threshold * (1 + 1e-5)).sum(2).clamp(max=per_class)
    most = (exact > threshold * (1 - 1e-5)).sum(2).clamp(max=per_class)
    assert ((filled >= least) & (filled <= most)).all()
    chosen = torch.zeros_like(exact, dtype=torch.bool)
    for image, label, place in live.nonzero().tolist():
        chosen[image, label, priors[image, label, place]] = True
    worst = torch.where(live, scores.double(), 2).amin(2) if per_class else None
    left = torch.where(chosen, -1, exact).amax(2)
    assert ((left <= worst * (1 + 1e-5)) | (filled < per_class)).all()
    return scores, priors


@settings(max_examples=40)
@given(
    images=st.integers(1, 3),
    count=st.sampled_from([1, 7, 64, 300, 700]),
    classes=st.sampled_from([1, 2, 5, 16, 33]),
    dtype=st.sampled_from(DTYPES),
    per_class=st.sampled_from([1, 2, 31, 200]),
    threshold=st.sampled_from([0.0, 1e-6, 0.05, 0.5, 0.999, 1.0, -1.0]),
    seed=st.integers(0, 1000),
)
def test_random_outputs(implementation, images, count, classes, dtype, per_class, threshold, seed):
    if images * classes > 40:
        images = 1
    check(implementation.device, outputs(images, count, classes, dtype, seed), threshold, per_class)


def test_all_priors(implementation):
    few = implementation.name == "emulated gpu"
    scores, _ = check(implementation.device, outputs(1 if few else 4, 8732, 6 if few else 80), 0.05, 200)
    assert (scores[0] >= 0).all() or not few


@pytest.mark.parametrize("per_class", [1, 40, 300])
def test_of_equal_scores_the_first_priors_are_chosen(implementation, per_class):
    kinds = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    logits = kinds[torch.arange(600) * 7 % 3].expand(2, 600, 4).contiguous()
    _, priors = check(implementation.device, logits, 0.0, per_class)
    exact = logits[0].double().softmax(1)
    for label in range(3):
        order = sorted(range(600), key=lambda p: (-float(exact[p, label + 1]), p))
        for image in range(2):
            assert priors[image, label].tolist() == sorted(order[:per_class])


def test_infinities_and_nan(implementation):
    logits = outputs(2, 90, 5)
    logits[0, 3, 2] = logits[1, 7, 0] = torch.nan
    logits[0, 9, 1], logits[1, 5] = torch.inf, -torch.inf
    logits[0, 20, 1:4] = -torch.inf
    scores, priors = (x.cpu() for x in torch.ops.ssd300.candidates(logits.to(implementation.device), 0.0, 90))
    assert not scores.isnan().any()
    live = [set(priors[image][scores[image] >= 0].tolist()) for image in range(2)]
    assert live[0].isdisjoint({3, 9}) and live[1].isdisjoint({5, 7}) and len(live[0]) == len(live[1]) == 88


@pytest.mark.parametrize(("images", "count", "classes"), [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_nothing_to_choose_from(implementation, images, count, classes):
    logits = torch.zeros(images, count, classes + 1, device=implementation.device)
    scores, priors = torch.ops.ssd300.candidates(logits, 0.05, 7)
    assert scores.shape == priors.shape == (images, classes, 7) and (scores == -1).all() and not priors.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_class", [3, 100])
def test_the_public_function_is_the_reference(implementation, dtype, per_class):
    logits = outputs(3, 400, 7, dtype)
    logits[2, :, 0] += 30  # nothing
    scores, priors, labels = (x.cpu() for x in candidates(logits.to(implementation.device), 0.05, per_class))
    expected = candidates_reference(logits, 0.05, per_class)
    assert (scores[:, :-1] >= scores[:, 1:]).all() and (scores[2] == -1).all()
    for image in range(3):
        live, there = scores[image] >= 0, expected[0][image] >= 0
        own = {(p, k): s for s, p, k in zip(*(x[image][live].tolist() for x in (scores, priors, labels)))}
        other = {(p, k): s for s, p, k in zip(*(x[image][there].tolist() for x in expected))}
        assert own == pytest.approx(other, rel=ROUNDING)


def test_a_part_of_a_larger_tensor(implementation):
    logits = outputs(1, 50, 6)
    storage = torch.zeros(logits.numel() + 1, device=implementation.device)
    shifted = storage[1:].view_as(logits).copy_(logits)
    ours = torch.ops.ssd300.candidates(shifted, 0.05, 9)
    for own, other in zip(ours, torch.ops.ssd300.candidates(logits.to(implementation.device), 0.05, 9)):
        assert torch.equal(own, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 5)}, r"logits must be \[N, P, K \+ 1\]"),
        ({"logits": torch.zeros(2, 5, 3, dtype=torch.float64)}, "logits must be float32"),
        ({"logits": torch.zeros(2, 3, 5).mT}, "logits must be contiguous"),
        ({"per_class": 0}, "per_class must be positive"),
    ],
)
def test_wrong_arguments_are_named(implementation, change, message):
    arguments = {"logits": torch.zeros(2, 5, 3), "threshold": 0.05, "per_class": 3} | change
    arguments["logits"] = arguments["logits"].to(implementation.device)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ssd300.candidates(**arguments)


def test_float64_is_the_references(implementation):
    with pytest.raises(UserError, match="candidates can't run: no code for"):
        candidates(outputs(1, 20, 3, torch.float64).to(implementation.device), 0.05, 10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_registration(implementation, dtype):
    logits = outputs(2, 30, 5, dtype).to(implementation.device)
    torch.library.opcheck(torch.ops.ssd300.candidates.default, (logits, 0.05, 20))


def test_the_number_of_threads_does_not_matter():
    logits, before = outputs(3, 500, 16), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(candidates(logits, 0.05, 100))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))
