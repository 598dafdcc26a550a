"""Many weights scaled and rounded in one pass, over every implementation, against plain PyTorch."""

import pytest
import torch
from torch import Tensor

from detcore.device import native
from detcore.ops.fold import autocast_dtype, fold, fold_reference, narrow_copies

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (8, 3, 7, 7),
    (16, 8, 1, 1),
    (36, 16, 3, 3),
    (5, 1, 3, 3),
    (7,),
    (24,),
    (0,),
    (0, 3, 1, 1),
    (2, 5000),
    (64, 4, 3, 3),
]
OP = torch.ops.detcore.fold_


def weights(device, shapes=SHAPES, layout=torch.channels_last) -> tuple[list[Tensor], list[Tensor]]:
    """Random values and scales."""
    generator = torch.Generator().manual_seed(7)
    values = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    scales = [(torch.rand(shape[0], generator=generator) + 0.5).to(device) for shape in shapes]
    return [v.contiguous(memory_format=layout) if v.dim() == 4 else v for v in values], scales


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_equals_the_reference(implementation, dtype, scaled, layout):
    values, scales = weights(implementation.device, layout=layout)
    leaves = [[v.clone().requires_grad_() for v in values] for _ in range(2)]
    results = [f(own, scales if scaled else (), dtype) for f, own in zip((fold, fold_reference), leaves, strict=True)]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(v.shape, generator=generator).to(implementation.device, dtype) for v in values]
    for outs in results:
        torch.autograd.backward(outs, upstream)
    for found, expected, a, b in zip(*results, *leaves, strict=True):
        assert found.dtype == dtype and found.stride() == a.stride() and torch.equal(found, expected)
        assert a.grad.dtype == torch.float32 and a.grad.stride() == a.stride() and torch.equal(a.grad, b.grad)


def test_more_tensors_than_a_launch_takes(implementation):
    values, scales = weights(implementation.device, [(2 + i % 3, 3) for i in range(150)])
    found = fold(values, scales, torch.bfloat16)
    assert all(map(torch.equal, found, fold_reference(values, scales, torch.bfloat16)))


def test_views_that_16_byte_accesses_cannot_read(implementation):
    buffer = torch.arange(65.0, device=implementation.device)
    found = fold([buffer[1:], buffer[:64]], (), torch.bfloat16)
    assert torch.equal(found[0], buffer[1:].bfloat16()) and torch.equal(found[1], buffer[:64].bfloat16())


def test_what_is_not_used_or_does_not_learn_has_no_gradient(implementation):
    values, scales = weights(implementation.device, [(4, 2, 1, 1)] * 3)
    values = [v.requires_grad_(i != 1) for i, v in enumerate(values)]
    a, b, _ = fold(values, scales, torch.bfloat16)
    assert a.requires_grad and not b.requires_grad
    found = torch.autograd.grad((a * 2).sum() + b.sum(), [values[0], values[2]], allow_unused=True)
    assert torch.equal(found[0], (2 * scales[0]).view(4, 1, 1, 1).expand(4, 2, 1, 1)) and found[1] is None
    with torch.no_grad():
        assert not fold(values, scales, torch.bfloat16)[0].requires_grad


def test_float64_is_the_references():
    values, scales = ([t.double() for t in part] for part in weights("cpu", [(4, 2, 1, 1), (3,)]))
    with native.using("auto"):
        assert torch.autograd.gradcheck(
            lambda *v: tuple(fold(v, scales, torch.float64)), [v.requires_grad_() for v in values]
        )


def test_copies_are_made_where_autocast_wants_another_type(implementation):
    parameters = [torch.nn.Parameter(v) for v in weights(implementation.device, [(4, 2, 3, 3), (4,)])[0]]
    assert narrow_copies(parameters) == {} and narrow_copies([]) == {}
    with torch.autocast(implementation.device.type, torch.bfloat16):
        copies = narrow_copies([*parameters, parameters[0].detach().bfloat16()])
        assert autocast_dtype(parameters[0]) == torch.bfloat16
    assert [id(p) for p in copies] == [id(p) for p in parameters]
    assert all(torch.equal(copies[p], p.bfloat16()) and copies[p].requires_grad for p in parameters)


def test_opcheck(implementation):
    values, scales = weights(implementation.device, [(4, 2, 3, 3), (5,)])
    outs = [torch.empty_like(v, dtype=torch.bfloat16) for v in values]
    torch.library.opcheck(OP.default, (outs, values, scales))
    torch.library.opcheck(OP.default, (outs, values, []))


def test_bad_arguments_are_refused(implementation):
    (a, b), (scale, other) = weights(implementation.device, [(4, 2, 3, 3), (5,)])
    low = a.bfloat16()
    for wrong, message in (
        (([low], [a, b], []), "one length"),
        (([low], [a], [scale, other]), "one length"),
        (([low.contiguous()], [a], []), "layouts"),
        (([b.bfloat16()], [a], []), "shapes"),
        (([low, b], [a, b], []), "one dtype"),
        (([low], [low.half()], []), "must be float32"),
        (([low], [a], [other]), "one value a row"),
        (([low], [a], [scale.double()]), "one value a row"),
        (([low], [a.double()], []), "values must be float32, bfloat16 or float16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OP(*wrong)
