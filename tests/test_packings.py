"""What is packed of plain tensors: found again, packed anew when it must be, gone with them."""

import gc

import pytest
import torch

from zeropoint import kernels, packings
from zeropoint.layout import Layout

pytestmark = pytest.mark.skipif(
    kernels.active_isa() == kernels.REFERENCE, reason="nothing is packed"
)


def tensors(n=8, k=4):
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    return weight, torch.rand(n) + 0.1, torch.zeros(n, dtype=torch.int32)


def test_the_same_tensors_have_one_packing():
    t = tensors()
    first = packings.remembered_qtensor(*t)
    assert packings.remembered_qtensor(*t)._packed is first._packed
    packings.forget(t[0])
    assert packings.remembered_qtensor(*t)._packed is not first._packed


def test_equal_tensors_are_not_the_same():
    t = tensors()
    other = packings.remembered_qtensor(t[0].clone(), *t[1:])
    assert packings.remembered_qtensor(*t)._packed is not other._packed


def test_a_view_of_the_memory_is_another_tensor_that_sees_changes():
    t = tensors()
    view = t[0].view(8, 4)
    first = packings.remembered_qtensor(view, *t[1:])._packed
    t[0].zero_()
    assert packings.remembered_qtensor(view, *t[1:])._packed is not first


def test_a_packing_does_not_keep_its_tensors():
    before = packings.count()
    gc.disable()
    try:
        t = tensors()
        q = packings.remembered_qtensor(*t)
        assert packings.count() == before + 1
        packed = q._packed
        del q, t
        assert packings.count() == before
        assert packed.core.nbytes > 0  # what someone still uses is still there
    finally:
        gc.enable()


def test_a_reused_id_is_not_mistaken():
    for _ in range(200):
        weight = torch.full((8, 4), 1.0)
        weight += torch.rand(())
        packed = packings.remembered_float(weight)
        assert packed.unpack()[0].equal(weight)


def test_shared_between_layers_first():
    t = tensors()
    remembered = packings.remembered_qtensor(*t)
    shared = packings.shared_qtensor(*t)
    assert shared is packings.shared_qtensor(*t)
    assert packings.remembered_qtensor(*t) is shared
    assert packings.count() == 0 or id(t[0]) not in packings._remembered
    del remembered


def test_version():
    t = torch.zeros(2)
    before = packings.version(t)
    t += 1
    assert packings.version(t) == before + 1
    assert packings.version(None) == -1
    with torch.inference_mode():
        assert packings.version(torch.zeros(1)) == -1


def test_layers_that_read_one_buffer_as_two_widths():
    codes = torch.randint(0, 256, (8, 3), dtype=torch.uint8)
    scale, zero_point = torch.rand(8) + 0.1, torch.zeros(8, dtype=torch.int32)
    layouts = [Layout.of(torch.Size((8, k)), False, bits, None) for k, bits in ((6, 4), (12, 2))]
    wide, narrow = (packings.shared_qtensor(codes, scale, zero_point, x) for x in layouts)
    assert (wide.shape, narrow.shape) == ((8, 6), (8, 12))
    assert packings.remembered_qtensor(codes, scale, zero_point, layouts[0]).bits == 4
    assert packings.remembered_qtensor(codes, scale, zero_point, layouts[1]).bits == 2
