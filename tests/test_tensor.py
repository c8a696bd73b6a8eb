from __future__ import annotations

import copy
import math
import struct
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zeropoint
from bits import assert_same_bits
from zeropoint import PerChannel, QTensor, QuantSpec
from zeropoint.affine import quantize

INF, NAN = math.inf, math.nan
SMALLEST, LARGEST = 2.0**-149, torch.finfo(torch.float32).max
JUST_ABOVE_2_TO_128 = 2.0**-128 + 2.0**-149  # the smallest scale with a finite reciprocal
DTYPES = [(torch.quint8, torch.uint8), (torch.qint8, torch.int8)]
SPECS = [QuantSpec(signed=g, symmetric=y) for g in (True, False) for y in (True, False)]

floats = st.one_of(
    st.floats(width=32, allow_nan=False),
    st.sampled_from([0.0, -0.0, SMALLEST, -SMALLEST, LARGEST, -LARGEST, INF, -INF, 2.0**31, 1e30]),
)
steps = st.integers(-600, 600).map(lambda i: i / 2)  # whole and halfway points, in units of scale
scales = st.one_of(
    st.floats(2.0**-14, 8.0, width=32),
    st.integers(-127, 127).map(lambda e: 2.0**e),
    st.floats(JUST_ABOVE_2_TO_128, LARGEST, width=32),
)


def f32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def bounds(dtype: torch.dtype) -> tuple[int, int]:
    info = torch.iinfo(dtype)
    return info.min, info.max


# ---- as torch quantizes -------------------------------------------------------------------------


@given(data=st.data(), values=st.lists(floats, max_size=70), halves=st.lists(steps, max_size=40))
@pytest.mark.parametrize(("q", "storage"), DTYPES)
def test_per_tensor_has_the_integers_of_torch(
    q: torch.dtype, storage: torch.dtype, data: st.DataObject, values: list, halves: list
) -> None:
    scale = data.draw(scales)
    zero_point = data.draw(st.integers(*bounds(storage)))
    x = torch.cat((torch.tensor(values), torch.tensor(halves) * torch.tensor(scale)))
    x = x[~x.isnan()]  # a halfway point of a scale of 1e38 may be inf; 0 times it NaN
    theirs = torch.quantize_per_tensor(x, scale, zero_point, q)
    for dtype in (q, storage):
        ours = zeropoint.quantize_per_tensor(x, scale, zero_point, dtype)
        assert_same_bits(ours.int_repr(), theirs.int_repr())
    assert (ours.q_scale(), ours.q_zero_point()) == (f32(theirs.q_scale()), theirs.q_zero_point())


@given(data=st.data())
@pytest.mark.parametrize(("q", "storage"), DTYPES)
def test_per_channel_has_the_integers_of_torch(
    q: torch.dtype, storage: torch.dtype, data: st.DataObject
) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    axis = data.draw(st.integers(0, len(shape) - 1))
    n, size = shape[axis], math.prod(shape)
    s = torch.tensor(data.draw(st.lists(scales, min_size=n, max_size=n)), dtype=torch.float64)
    z = torch.tensor(data.draw(st.lists(st.integers(*bounds(storage)), min_size=n, max_size=n)))
    values = data.draw(st.lists(st.one_of(floats, steps), min_size=size, max_size=size))
    x = torch.tensor(values, dtype=torch.float32).reshape(shape)
    theirs = torch.quantize_per_channel(x, s, z, axis, q)
    for dtype in (q, storage):
        ours = zeropoint.quantize_per_channel(x, s, z, axis, dtype)
        assert_same_bits(ours.int_repr(), theirs.int_repr())
    assert ours.q_per_channel_axis() == theirs.q_per_channel_axis() == axis
    assert ours.q_per_channel_zero_points().tolist() == z.tolist()
    assert ours.q_per_channel_scales().tolist() == s.to(torch.float32).tolist()


def test_many_random_values_have_the_integers_of_torch() -> None:
    x = torch.randn(300_000) * 3
    for scale in (0.01, 0.0235, 1 / 3):
        theirs = torch.quantize_per_tensor(x, scale, 117, torch.quint8)
        ours = zeropoint.quantize_per_tensor(x, scale, 117, torch.quint8)
        assert_same_bits(ours.int_repr(), theirs.int_repr())
        assert len(ours.int_repr().unique()) > 50
        s, z = torch.tensor([scale]), torch.tensor([117])
        theirs = torch.quantize_per_channel(x[None], s, z, 0, torch.quint8)
        ours = zeropoint.quantize_per_channel(x[None], s, z, 0, torch.quint8)
        assert_same_bits(ours.int_repr(), theirs.int_repr())


def test_halfway_cases_round_to_even() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    q = zeropoint.quantize_per_tensor(x, 1.0, 10, torch.uint8)
    assert q.int_repr().tolist() == [8, 8, 10, 10, 12, 12]
    # An odd zero point: torch rounds its sum with the real, the layers round the real alone.
    q = zeropoint.quantize_per_tensor(x, 1.0, 11, torch.uint8)
    assert q.int_repr().tolist() == [8, 10, 10, 12, 12, 14]
    one, eleven = torch.tensor([1.0]), torch.tensor([11])
    q = zeropoint.quantize_per_channel(x[None], one, eleven, 0, torch.uint8)
    assert q.int_repr().tolist() == [[8, 10, 10, 12, 12, 14]]
    assert quantize(x, one, eleven, 0, 255).tolist() == [9, 9, 11, 11, 13, 13]


@given(data=st.data(), values=st.lists(floats, max_size=70), halves=st.lists(steps, max_size=40))
def test_the_layers_rounding_is_at_most_one_from_torchs(
    data: st.DataObject, values: list, halves: list
) -> None:
    scale, zero_point = torch.tensor(data.draw(scales)), data.draw(st.integers(0, 255))
    x = torch.cat((torch.tensor(values), torch.tensor(halves) * scale))
    x = x[~x.isnan()]
    theirs = zeropoint.quantize_per_tensor(x, scale, zero_point, torch.uint8).int_repr().int()
    ours = quantize(x, scale, torch.tensor(zero_point), 0, 255)
    assert ((ours - theirs).abs() <= 1).all()
    steps_from_half = ((x.double() / scale.double()) % 1 - 0.5).abs()
    assert (steps_from_half[ours != theirs] < 1e-4).all()


def test_infinities_and_huge_values_clamp() -> None:
    x = torch.tensor([INF, -INF, LARGEST, -LARGEST, 2.0**31, -(2.0**31), 2.0**32, 1e30])
    q = zeropoint.quantize_per_tensor(x, 1e-3, 5, torch.uint8)
    assert q.int_repr().tolist() == [255, 0, 255, 0, 255, 0, 255, 255]


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match=r"input holds NaN \(first at index \(0, 1\)\)"):
        zeropoint.quantize_per_tensor(torch.tensor([[0.0, NAN]]), 1.0, 0, torch.int8)


@pytest.mark.parametrize("zero_point", [0, 255])
def test_nan_reaching_the_rounding_becomes_qmin(zero_point: int) -> None:
    q = quantize(torch.tensor([NAN, 0.0]), torch.tensor(1.0), torch.tensor(zero_point), 0, 255)
    assert q.tolist() == [0, zero_point]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_float_types_round_to_float32_first(dtype: torch.dtype) -> None:
    x = torch.randn(200).to(dtype)
    ours = zeropoint.quantize_per_tensor(x, 0.02, 3, torch.int8)
    theirs = torch.quantize_per_tensor(x.to(torch.float32), 0.02, 3, torch.qint8)
    assert_same_bits(ours.int_repr(), theirs.int_repr())


def test_strided_and_graph_inputs() -> None:
    x = torch.randn(6, 8, requires_grad=True)
    ours = zeropoint.quantize_per_tensor(x.T[::2], 0.1, 0, torch.int8)
    again = zeropoint.quantize_per_tensor(x.detach().T[::2].clone(), 0.1, 0, torch.int8)
    assert_same_bits(ours.int_repr(), again.int_repr())
    assert not ours.dequantize().requires_grad


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), ()])
def test_empty_and_scalar_inputs(shape: tuple[int, ...]) -> None:
    q = zeropoint.quantize_per_tensor(torch.zeros(shape), 1.0, 7, torch.uint8)
    assert q.shape == shape
    assert q.int_repr().eq(7).all()
    assert q.dequantize().shape == shape
    assert "scale=1" in repr(q)
    if shape:
        n = shape[-1]
        z = torch.zeros(n, dtype=torch.int32)
        channels = zeropoint.quantize_per_channel(
            torch.zeros(shape), torch.ones(n), z, -1, torch.int8
        )
        assert channels.shape == shape
        assert channels.axis == len(shape) - 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], 1.0, 0, torch.int8), TypeError, "input must be a torch.Tensor, got list"),
        ((torch.arange(3), 1.0, 0, torch.int8), TypeError, "input must be a floating-point"),
        ((torch.ones(3), 1.0, 0, torch.int32), ValueError, "dtype must be torch.int8"),
        ((torch.ones(3), 0.0, 0, torch.int8), ValueError, "scale must be positive"),
        ((torch.ones(3), 1.0, 128, torch.int8), ValueError, r"within \[-128, 127\]"),
        ((torch.ones(3), 1.0, -1, torch.uint8), ValueError, r"within \[0, 255\]"),
    ],
)
def test_quantize_per_tensor_refuses(arguments: tuple, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        zeropoint.quantize_per_tensor(*arguments)


# ---- QTensor ------------------------------------------------------------------------------------

INTEGERS = torch.tensor([[1, -2, 3], [4, 5, -128]], dtype=torch.int8)


def per_channel(axis: int = 0) -> QTensor:
    n = INTEGERS.shape[axis]
    return QTensor(INTEGERS.clone(), torch.arange(1.0, n + 1), torch.arange(n), axis)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((INTEGERS.tolist(), 1.0), TypeError, "int_repr must be .* got list"),
        ((INTEGERS.to(torch.int16), 1.0), TypeError, "int_repr must be .* got torch.int16"),
        ((INTEGERS, 0.0), ValueError, "scale must be positive and finite.* got 0.0"),
        ((INTEGERS, -1.0), ValueError, "scale must be positive and finite.* got -1.0"),
        ((INTEGERS, INF), ValueError, "scale must be positive and finite.* got inf"),
        ((INTEGERS, NAN), ValueError, "scale must be positive and finite.* got nan"),
        ((INTEGERS, 1e-50), ValueError, "scale must be positive and finite.* got 0.0"),
        ((INTEGERS, 1e39), ValueError, "scale must be positive and finite.* got inf"),
        ((INTEGERS, 2.0**-128), ValueError, "so must 1/scale"),
        ((INTEGERS, torch.ones(2)), ValueError, r"scale must have shape \(\) \(per tensor\)"),
        ((INTEGERS, 1.0, 0.0), TypeError, "zero_point must hold integers, got torch.float"),
        ((INTEGERS, 1.0, True), TypeError, "zero_point must hold integers, got torch.bool"),
        ((INTEGERS, 1.0, 128), ValueError, r"zero_point must be within \[-128, 127\]"),
        ((INTEGERS, 1.0, -(2**40)), ValueError, r"zero_point must be within \[-128, 127\]"),
        ((INTEGERS, 1.0, torch.zeros(2, dtype=torch.int)), ValueError, "zero_point must have"),
        ((INTEGERS, torch.ones(2), 0, 0), ValueError, r"zero_point must have shape \(2,\)"),
        ((INTEGERS, torch.ones(3), torch.zeros(2, dtype=torch.int), 0), ValueError, "axis 0"),
        ((INTEGERS, torch.ones(2), torch.zeros(2, dtype=torch.int), 2), ValueError, "axis must"),
        ((INTEGERS, torch.ones(2), torch.zeros(2, dtype=torch.int), 0.0), TypeError, "axis must"),
        ((INTEGERS, torch.ones(2), torch.zeros(2, dtype=torch.int), True), TypeError, "axis must"),
    ],
)
def test_constructor_refuses(arguments: tuple, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        QTensor(*arguments)


def test_smallest_scale_with_a_finite_reciprocal_is_taken() -> None:
    q = zeropoint.quantize_per_tensor(torch.zeros(2), JUST_ABOVE_2_TO_128, 3, torch.uint8)
    assert q.int_repr().tolist() == [3, 3]


def test_default_dtype_does_not_round_the_scale() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert QTensor(INTEGERS, 0.1).q_scale() == f32(0.1)
    finally:
        torch.set_default_dtype(before)


def test_dequantize_is_scale_times_integers_less_zero_point() -> None:
    assert QTensor(INTEGERS, 0.5, -3).dequantize().tolist() == [[2.0, 0.5, 3.0], [3.5, 4.0, -62.5]]
    assert per_channel(0).dequantize().tolist() == [[1.0, -2.0, 3.0], [6.0, 8.0, -258.0]]
    assert per_channel(1).dequantize().tolist() == [[1.0, -6.0, 3.0], [4.0, 8.0, -390.0]]
    assert per_channel(-1).axis == 1


def test_accessors_say_what_they_need() -> None:
    q, c = QTensor(INTEGERS, 0.5, 3), per_channel()
    assert (q.q_scale(), q.q_zero_point(), q.axis) == (0.5, 3, None)
    assert c.q_per_channel_scales().tolist() == [1.0, 2.0]
    assert c.q_per_channel_zero_points().tolist() == [0, 1]
    assert c.q_per_channel_axis() == 0
    assert (q.qscheme(), c.qscheme()) == (torch.per_tensor_affine, torch.per_channel_affine)
    for name in ("q_scale", "q_zero_point"):
        with pytest.raises(ValueError, match=f"{name} needs a per-tensor QTensor"):
            getattr(c, name)()
    for name in ("q_per_channel_scales", "q_per_channel_zero_points", "q_per_channel_axis"):
        with pytest.raises(ValueError, match=f"{name} needs a per-channel QTensor"):
            getattr(q, name)()


def test_answers_like_a_tensor() -> None:
    q = QTensor(INTEGERS, 0.5)
    assert (q.shape, q.ndim, q.dim(), q.numel(), len(q)) == ((2, 3), 2, 2, 6, 2)
    assert (q.size(), q.size(1), q.size(-1)) == ((2, 3), 3, 3)
    assert (q.dtype, q.device.type) == (torch.int8, "cpu")
    assert q.int_repr().data_ptr() == INTEGERS.data_ptr()


def test_spec_says_what_the_integers_follow() -> None:
    assert QTensor(INTEGERS, 1.0).spec == QuantSpec()
    assert not QTensor(INTEGERS, 1.0, 1).spec.symmetric
    assert per_channel(1).spec == QuantSpec(symmetric=False, granularity=PerChannel(1))
    assert QTensor(INTEGERS.view(torch.uint8), 1.0, 128).spec == QuantSpec(signed=False)


@pytest.mark.parametrize("q", [QTensor(INTEGERS, 0.5, 3), per_channel(0), per_channel(1)])
@pytest.mark.parametrize(
    "index",
    [0, -1, slice(1, None), (slice(None), 1), (0, 1), (0, slice(0, 2)), ..., (..., 0), (0, ...),
     (slice(None), slice(None, None, 2)), slice(0, 0), (..., slice(1, 3))],
)  # fmt: skip
def test_index_takes_scale_and_zero_point_along(q: QTensor, index: object) -> None:
    assert_same_bits(q[index].dequantize(), q.dequantize()[index])
    assert_same_bits(q[index].int_repr(), q.int_repr()[index])


@pytest.mark.parametrize(
    "index", [[1, 0], torch.tensor([1, 1, 0]), torch.tensor([True, False]), [False, True]]
)
def test_index_by_list_along_the_first_axis(index: object) -> None:
    for q in (QTensor(INTEGERS, 0.5, 3), per_channel(0)):
        assert_same_bits(q[index].dequantize(), q.dequantize()[index])


@pytest.mark.parametrize(
    "index", [None, torch.tensor([[0, 1]]), (slice(None), [0, 1]), True, ([0], [1])]
)
def test_index_that_loses_the_channel_axis_is_refused(index: object) -> None:
    with pytest.raises(IndexError, match="a per-channel QTensor takes"):
        per_channel(0)[index]


def test_index_out_of_range_and_iteration() -> None:
    with pytest.raises(IndexError):
        per_channel()[2]
    rows = [row.dequantize().tolist() for row in per_channel()]
    assert rows == per_channel().dequantize().tolist()


def test_index_shares_integers() -> None:
    q = per_channel()
    q.int_repr()[1, 0] = 100
    assert q[1].int_repr()[0] == 100


def test_printing_shows_values_scale_and_zero_point() -> None:
    q = QTensor(torch.tensor([[0, 255]], dtype=torch.uint8), 0.1, 128)
    assert repr(q) == (
        "QTensor([[-12.8000,  12.7000]], dtype=uint8, scale=0.100000001, zero_point=128)"
    )
    assert repr(per_channel(0)) == (
        "QTensor([[   1.,   -2.,    3.],\n"
        "         [   6.,    8., -258.]], dtype=int8, scale=[1, 2], zero_point=[0, 1], axis=0)"
    )
    many = QTensor(torch.zeros(9, dtype=torch.int8), torch.ones(9), torch.arange(9), 0)
    assert "zero_point=[0, 1, 2, 3, …]" in repr(many)


def test_clone_shares_nothing_and_to_keeps_everything() -> None:
    for q in (QTensor(INTEGERS.clone(), 0.5, 3), per_channel()):
        for other in (q.clone(), copy.deepcopy(q)):
            before = other.dequantize().clone()
            q.int_repr().add_(1)
            q.scale.mul_(2)
            q.zero_point.add_(1)
            assert_same_bits(other.dequantize(), before)
            assert other.axis == q.axis
        assert_same_bits(q.to("cpu").dequantize(), q.dequantize())
        moved = q.to("meta")
        assert (moved.device.type, moved.shape) == ("meta", q.shape)


def test_deepcopy_of_a_packed_qtensor() -> None:
    w = QTensor(INTEGERS, 0.5)
    x = torch.ones(1, 3)
    y = zeropoint.functional.linear(x, w)
    assert_same_bits(zeropoint.functional.linear(x, copy.deepcopy(w)), y)


# ---- torch's quantized tensors ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.quint8, torch.qint8])
def test_from_torch_keeps_integers_and_reals(dtype: torch.dtype) -> None:
    x = torch.randn(5, 4)
    s, z = torch.rand(4, dtype=torch.float64) + 0.1, torch.randint(0, 100, (4,))
    for theirs in (
        torch.quantize_per_tensor(x, 1 / 3, 7, dtype),
        torch.quantize_per_channel(x, s, z, 1, dtype),
        torch.quantize_per_channel(x, s, z, 1, dtype)[1:3],
    ):
        ours = QTensor.from_torch(theirs)
        assert_same_bits(ours.int_repr(), theirs.int_repr())
        # torch rounds scale * zero_point apart; the difference is of that product's rounding.
        torch.testing.assert_close(ours.dequantize(), theirs.dequantize(), rtol=1e-6, atol=1e-5)
        assert ours.qscheme() == theirs.qscheme()


def test_from_torch_is_silent() -> None:
    q = torch.quantize_per_channel(torch.ones(2, 2), torch.ones(2), torch.arange(2), 0, torch.qint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        QTensor.from_torch(q)


def test_from_torch_refuses() -> None:
    for wrong in (torch.ones(2), [1]):
        with pytest.raises(TypeError, match="q must be a quantized"):
            QTensor.from_torch(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"quint8 or torch\.qint8, got torch\.qint32"):
        QTensor.from_torch(torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint32))
    floating = torch.quantize_per_channel(
        torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.quint8
    )
    assert floating.qscheme() == torch.per_channel_affine_float_qparams
    with pytest.raises(ValueError, match="per-tensor or per-channel affine"):
        QTensor.from_torch(floating)
