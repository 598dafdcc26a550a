"""The selection of candidates: the native op against its reference, and the reference against sorting all pairs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from detcore import UserError
from single_stage_detector.ops import candidates as module
from single_stage_detector.ops.candidates import candidates, candidates_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEVELS = (300, 77, 9)
INF = float("inf")


def outputs(images: int, levels: tuple[int, ...], classes: int, dtype=torch.float32, seed: int = 0, step: float = 0.0):
    """Logits and deltas of a batch; step: the logits are multiples of it, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(images, a, classes, generator=generator) * 2 - 3 for a in levels]
    if step:
        logits = [(x / step).round() * step for x in logits]
    deltas = [torch.randn(images, a, 4, generator=generator) for a in levels]
    return [x.to(dtype) for x in logits], [x.to(dtype) for x in deltas]


def check(
    device, logits: list[Tensor], deltas: list[Tensor], topk: int, floor: float = -INF, bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The op's results, which must be the reference's in every bit."""
    ours = torch.ops.single_stage_detector.candidates(
        [x.to(device) for x in logits],
        [x.to(device) for x in deltas],
        topk,
        floor,
        None if bias is None else bias.to(device),
    )
    for own, expected in zip(ours, candidates_reference(logits, deltas, topk, floor, bias), strict=True):
        assert own.dtype == expected.dtype
        assert torch.equal(own.cpu(), expected)
    return ours


@settings(max_examples=40)
@given(
    images=st.integers(0, 3),
    levels=st.lists(st.integers(1, 400), min_size=1, max_size=4),
    classes=st.sampled_from([1, 2, 5, 16, 33, 264]),
    dtype=st.sampled_from(DTYPES),
    topk=st.sampled_from([1, 2, 31, 100, 1000, 10**6]),
    floor=st.sampled_from([-INF, -8.0, -2.5, 0.0, 30.0, INF]),
    step=st.sampled_from([0.0, 0.5, 4.0]),
    seed=st.integers(0, 1000),
)
def test_random_outputs(implementation, images, levels, classes, dtype, topk, floor, step, seed):
    if sum(levels) * classes > 60000:
        levels = levels[:1]
    logits, deltas = outputs(images, tuple(levels), classes, dtype, seed, step)
    check(implementation.device, logits, deltas, topk, floor)


@settings(max_examples=20)
@given(
    images=st.integers(0, 2),
    cells=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    per_cell=st.sampled_from([1, 3, 9]),
    classes=st.sampled_from([1, 5, 16, 264]),
    dtype=st.sampled_from(DTYPES),
    topk=st.sampled_from([1, 31, 1000]),
    floor=st.sampled_from([-INF, -2.5, INF]),
    step=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 1000),
)
def test_the_bias_of_the_convolution(implementation, images, cells, per_cell, classes, dtype, topk, floor, step, seed):
    if sum(cells) * per_cell * classes > 30000:
        cells = [4]
    logits, deltas = outputs(images, tuple(c * per_cell for c in cells), classes, dtype, seed, step)
    bias = outputs(1, (per_cell,), classes, torch.float32, seed + 1, step)[0][0].flatten()
    check(implementation.device, logits, deltas, topk, floor, bias)


def test_a_bias_is_the_sum_made_before(implementation):
    """In float32 the results are those of logits that have their bias, in every bit; NaN and infinities too."""
    logits, deltas = outputs(2, (45, 18), 8)
    logits[0][0, 3, 2], logits[1][1, 4], logits[1][0, 1, 1] = torch.nan, -INF, INF
    bias = outputs(1, (9,), 8, seed=3)[0][0].flatten()
    summed = [(x.unflatten(1, (-1, 9)) + bias.view(9, 8)).flatten(1, 2) for x in logits]
    given = [[x.to(implementation.device) for x in part] for part in (logits, summed, deltas)]
    found = candidates(given[0], given[2], 0.05, 50, bias.to(implementation.device))
    assert all(map(torch.equal, found, candidates(given[1], given[2], 0.05, 50)))
    plain = candidates(given[0], given[2], 0.05, 50)
    assert not torch.equal(found[0], plain[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [-0.0, 3.0, -5.5])
def test_all_alike(implementation, dtype, value):
    logits, deltas = outputs(2, LEVELS, 16, dtype)
    logits = [torch.full_like(x, value) for x in logits]
    logits[0][0, 5, 3] = 0.0  # equal to -0.0
    _, anchors, labels, _ = check(implementation.device, logits, deltas, 40)
    assert anchors[1, :40].tolist() == [0] * 16 + [1] * 16 + [2] * 8
    assert labels[1, :40].tolist() == [*range(16), *range(16), *range(8)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nan(implementation, dtype):
    logits, deltas = outputs(2, LEVELS, 8, dtype)
    logits[0][0, 3, 2] = logits[1][0, 0, 7] = torch.nan
    logits[2][1] = -torch.tensor(torch.nan)
    logits[0][1, 4, 1], logits[0][1, 5] = INF, -INF
    values, anchors, _, _ = check(implementation.device, logits, deltas, 10000)
    assert not values.isnan().any()
    found = [set(a[v > -INF].tolist()) for a, v in zip(anchors.cpu(), values.cpu())]
    assert found[0] == set(range(sum(LEVELS))) - {3, 300}
    assert found[1] == set(range(377)) - {5}
    assert values.max() == INF


@pytest.mark.parametrize("classes", [1, 8, 11, 300])
def test_pairs_of_few_anchors(implementation, classes):
    """One anchor holds all the best pairs, another level is below the floor, and one has exactly as many as wanted."""
    logits, deltas = outputs(1, (290, 20, 5), classes)
    logits[0][0, 288] += 100
    logits[1] -= 100
    values = check(implementation.device, logits, deltas, 5 * classes, -20.0)[0]
    assert (values[0, -5 * classes :] > -INF).all()


def test_deltas_keep_their_dtype(implementation):
    logits, deltas = outputs(2, LEVELS, 8, torch.bfloat16)
    check(implementation.device, logits, [x.float() for x in deltas], 30)
    check(implementation.device, [x.float() for x in logits], deltas, 30)


def test_a_part_of_a_larger_tensor(implementation):
    """Rows that do not start at a multiple of 16 bytes."""
    logits, deltas = outputs(1, LEVELS, 8)
    storage = torch.zeros(logits[0].numel() + 1, device=implementation.device)
    shifted = storage[1:].view_as(logits[0]).copy_(logits[0])
    assert shifted.data_ptr() % 16
    ours = torch.ops.single_stage_detector.candidates([shifted], [deltas[0].to(implementation.device)], 20, -INF)
    for own, expected in zip(ours, candidates_reference(logits[:1], deltas[:1], 20, -INF), strict=True):
        assert torch.equal(own.cpu(), expected)


@pytest.mark.parametrize("step", [0.0, 1.0])
@pytest.mark.parametrize("topk", [1, 25, 3000])
def test_the_reference_sorts_all_pairs(topk, step):
    logits, deltas = outputs(2, (40, 7), 6, step=step)
    values, anchors, labels, found = candidates_reference(logits, deltas, topk, -4.0)
    for image in range(2):
        expected = []
        for first, level in ((0, 0), (40, 1)):
            flat = logits[level][image].flatten().tolist()
            best = sorted((-v, i) for i, v in enumerate(flat) if v >= -4.0)[:topk]
            rows = [(-v, first + i // 6, i % 6, *deltas[level][image, i // 6].tolist()) for v, i in best]
            rows.sort(key=lambda row: row[1:3])
            expected += rows + [(-INF, 0, 0, 0.0, 0.0, 0.0, 0.0)] * (min(topk, len(flat)) - len(rows))
        columns = (values[image], anchors[image], labels[image], *found[image].unbind(1))
        assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected


@pytest.mark.parametrize("threshold", [0.0, 1e-30, 0.05, 0.5, 0.9999, 1 - 1e-7, 1.0])
def test_scores_are_above_the_threshold_and_fall(implementation, threshold):
    logits, deltas = outputs(2, LEVELS, 5)
    logits = [x * 6 for x in logits]
    device = implementation.device
    arguments = [x.to(device) for x in logits], [x.to(device) for x in deltas], threshold, 10000
    scores, anchors, labels, _ = (x.cpu() for x in candidates(*arguments))
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    every = torch.cat(logits, 1).sigmoid()
    for image in range(2):
        live = scores[image] >= 0
        assert (scores[image][live] > threshold).all()
        assert live.sum() == (every[image] > threshold).sum()
        torch.testing.assert_close(every[image][anchors[image], labels[image]][live], scores[image][live])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": []}, "lists over the same levels"),
        ({"deltas": [torch.zeros(2, 5, 4)] * 2}, "lists over the same levels"),
        ({"logits": [torch.zeros(2, 5)]}, r"logits must be \[N, A, K\]"),
        ({"logits": [torch.zeros(2, 5, 3, dtype=torch.float64)]}, "logits must be float32"),
        ({"logits": [torch.zeros(2, 3, 5).mT]}, "logits must be contiguous"),
        ({"deltas": [torch.zeros(2, 6, 4)]}, "with the logits' N and A"),
        ({"deltas": [torch.zeros(2, 5, 4, dtype=torch.float64)]}, "of 2 or 4 bytes"),
        ({"topk": 0}, "topk must be positive"),
        ({"bias": torch.zeros(4)}, "bias must be float32"),
        ({"bias": torch.zeros(3, dtype=torch.float64)}, "bias must be float32"),
        ({"bias": torch.zeros(1, 3)}, "bias must be float32"),
        ({"bias": torch.zeros(6)}, "whole cells"),
    ],
)
def test_wrong_arguments_are_named(implementation, change, message):
    arguments = {"logits": [torch.zeros(2, 5, 3)], "deltas": [torch.zeros(2, 5, 4)], "topk": 3, "floor": 0.0} | change
    move = {k: [x.to(implementation.device) for x in v] if isinstance(v, list) else v for k, v in arguments.items()}
    if "bias" in move:
        move["bias"] = move["bias"].to(implementation.device)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.single_stage_detector.candidates(**move)


def test_float64_is_the_references(implementation):
    logits, deltas = outputs(1, LEVELS, 3, torch.float64)
    device = implementation.device
    with pytest.raises(UserError, match="candidates can't run: no code for"):
        candidates([x.to(device) for x in logits], [x.to(device) for x in deltas], 0.05, 10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_registration(implementation, dtype):
    logits, deltas = outputs(2, LEVELS, 5, dtype)
    device = implementation.device
    arguments = [x.to(device) for x in logits], [x.to(device) for x in deltas], 20, -3.0
    torch.library.opcheck(torch.ops.single_stage_detector.candidates.default, arguments)
    bias = torch.ones(5, device=device)
    torch.library.opcheck(torch.ops.single_stage_detector.candidates.default, (*arguments, bias))


def test_the_number_of_threads_does_not_matter():
    (logits, deltas), before = outputs(3, LEVELS, 16), torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(candidates(logits, deltas, 0.05, 100))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_the_reference_needs_no_look_at_the_values(monkeypatch):
    logits, deltas = outputs(3, LEVELS, 16)
    logits[1][2] -= 100
    short = candidates_reference(logits, deltas, 200, -1.0)
    monkeypatch.setattr(module, "_fullest", lambda alive: alive.shape[1])
    assert all(torch.equal(a, b) for a, b in zip(short, candidates_reference(logits, deltas, 200, -1.0)))
