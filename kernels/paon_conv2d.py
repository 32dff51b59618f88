r"""Padé neurons as convolutions and transposed convolutions (https://arxiv.org/abs/2403.11791).

With x^k the element-wise power, * a convolution or a transposed one, p_k = W_k * x^k for k = 1 ... M, q_k = V_k * x^k
for k = 1 ... N, the output is the rational function of their partial sums that `paon_linear` states. Padding by zeros
adds 0 to every term, so that a neuron at the border sees fewer inputs.

Cost: M + N times a convolution's, both ways, and the rational function. Each degree of each side is one convolution
that adds into one of at most four accumulators P_M, P_{M-1}, Q_N, Q_{N-1} (absolute: P_M and N terms). Both passes go
through the batch a few images at a time, so that powers and terms stay in the cache and are never stacked; one
convolution with the outputs of both sides is no faster on a CPU, and 2 to 10 times slower with groups. Saved for the
backward: x and the accumulators, none of them if N = 0.

Sums, powers and the rational function are float32 for half precision inputs, under autocast too. `torch.func`
transforms and higher derivatives go through the definition in plain torch; inside `use_backend("triton")` they raise.

Triton: cuDNN's convolutions by tensor cores, in the inputs' dtype, then one pass over their outputs; backward one pass
over dy and the accumulators, and 2 (M + N) convolutions. Floor: those convolutions. What is kept has the inputs' dtype.
In 16 bits a smooth denominator of degree 3 or more, as it comes near 0 and enlarges roundings, is made in float32: by
TF32, which for float16 does not help, unless `torch.backends.cudnn.allow_tf32` is off.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from archzoo.kernels import _pade
from archzoo.kernels._backend import refuse_triton, takes_triton
from archzoo.kernels._conv import check_input, check_output, output_size
from archzoo.kernels._op import (
    DifferentiableOp,
    autocast_dtype,
    compute_dtype,
    empty_if,
    flop_formula,
    under_transform,
    without_autocast,
)
from archzoo.kernels.paon_linear import (
    _accumulators,
    _degree,
    _unpack,
    _wants_gradient,
    _work_dtype,
    rounding_matters,
)

# Input, accumulators and their gradients of the images of a block.
_CPU_BLOCK, _GPU_BLOCK = 3 * 2**22, 2**28  # bytes

_convolution = torch.ops.aten.convolution.default
_convolution_backward = torch.ops.aten.convolution_backward.default

Geometry = tuple[list[int], list[int], list[int], bool, list[int], int]
"""Stride, padding, dilation, whether transposed, output padding, groups: as `torch.convolution` takes them."""


def paon_conv2d_reference(
    x: Tensor,
    numerator: Tensor | None,
    denominator: Tensor | None,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    absolute: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """The definition, in plain torch. x (B, C, H, W), numerator (M, ...), denominator (N, ...) -> (B, O, H', W').

    The weights of a degree are (O, C/groups, kh, kw), or (C, O/groups, kh, kw) if transposed.
    """

    def product(power: Tensor, w: Tensor) -> Tensor:
        if transposed:
            return F.conv_transpose2d(power, w, None, stride, padding, output_padding, groups, dilation)
        return F.conv2d(power, w, None, stride, padding, dilation, groups)

    w0 = None if bias is None else bias[:, None, None]
    return _pade.definition(x, numerator, denominator, w0, product, absolute, eps)


def _weights(numerator: Any, denominator: Any) -> Any:
    """The first that is there, of stacks of weights or of their shapes."""
    return denominator if numerator is None else numerator


def _out_shape(
    x: Sequence[int],
    weight: Sequence[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> list[int]:
    """(B, O, H', W'), of the shapes of x and of a stack of weights."""
    sides = zip(x[2:], weight[3:], stride, padding, dilation, output_padding, strict=True)
    size = [output_size(a, k, s, p, d, transposed, extra) for a, k, s, p, d, extra in sides]
    return [x[0], weight[2] * groups if transposed else weight[1], *size]


def _blocks(x: Tensor, out: Sequence[int], maps: int) -> Iterator[slice]:
    """Slices of images, one at least, whose inputs and so many maps of the output's size fit the block."""
    budget = _CPU_BLOCK if x.device.type == "cpu" else _GPU_BLOCK
    each = torch.promote_types(x.dtype, torch.float32).itemsize * (3 * prod(x.shape[1:]) + maps * prod(out[1:]))
    step = max(1, budget // max(1, each))
    return (slice(start, min(start + step, len(x))) for start in range(0, len(x), step))


def _constant(bias: Tensor | None, like: Tensor) -> Tensor:
    """w_0 as it is added to maps."""
    return like.new_zeros(1, 1, 1) if bias is None else bias.to(like.dtype)[:, None, None]


def _accumulated(total: Tensor, term: Tensor, k: int, degree: int, kept: Tensor) -> Tensor:
    """The sum of the terms up to the k-th; that of all, and if there is room that of all but one, go to `kept`."""
    if k == degree and len(kept):
        if k == 1:
            return kept[-1].copy_(term)
        if len(kept) == 2:
            kept[0] = total
        return torch.add(total, term, out=kept[-1])
    return term if k == 1 else total.add_(term)


@without_autocast
@torch.no_grad()
def _forward(
    x: Tensor,
    numerator: Tensor | None,
    denominator: Tensor | None,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    absolute: bool,
    eps: float,
    keep: bool,
    triton: bool = False,
) -> tuple[Tensor, Tensor]:
    """y (B, O, H', W') of x (B, C, H, W), in x's dtype; with `keep` the accumulators (S, B, O, H', W'), in the work's.

    As `_work_dtype` says; without `keep` S is 0.
    """
    M, N = _degree(numerator), _degree(denominator)
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    if triton:
        return _forward_triton(x, numerator, denominator, bias, geometry, absolute, eps, keep)
    out = _out_shape(x.shape, _weights(numerator, denominator).shape, *geometry)
    n_p, n_q = _accumulators(M, N, absolute)
    wide = compute_dtype(x, numerator, denominator)
    saved = torch.empty(n_p + n_q, *out, dtype=wide, device=x.device)
    y = torch.empty(out, dtype=x.dtype, device=x.device)
    W, V, w0 = (None if t is None else t.to(wide) for t in (numerator, denominator, bias))
    one = None if absolute else torch.ones(out[1], dtype=wide, device=x.device)
    for images in _blocks(x, out, n_p + n_q + 3):
        power = z = x[images].to(wide).contiguous()
        kept = saved[:, images]
        P, Q = _constant(bias, saved), saved.new_ones(1)
        for k in range(1, max(M, N) + 1):
            power = power if k == 1 else power * z
            if W is not None and k <= M:
                term = _convolution(power, W[k - 1], w0 if k == 1 else None, *geometry)
                P = _accumulated(P, term, k, M, kept[:n_p])
            if V is not None and k <= N:
                term = _convolution(power, V[k - 1], one if k == 1 else None, *geometry)
                if absolute:
                    kept[n_p + k - 1] = term
                else:
                    Q = _accumulated(Q, term, k, N, kept[n_p:])
        if N == 0:
            y[images] = P
        elif absolute:
            y[images] = _pade.absolute(P, kept[n_p:])
        else:
            y[images] = _pade.smooth(*_unpack(kept, M, N, _constant(bias, saved)), eps if N > 1 else 0.0)
    return y, saved if keep else saved.new_empty(0, *out)


def _forward_triton(
    x: Tensor,
    numerator: Tensor | None,
    denominator: Tensor | None,
    bias: Tensor | None,
    geometry: Geometry,
    absolute: bool,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    from archzoo.kernels import _pade_triton

    M, N = _degree(numerator), _degree(denominator)
    out = _out_shape(x.shape, _weights(numerator, denominator).shape, *geometry)
    work, wide = _work_dtype(True, x, numerator, denominator), compute_dtype(x, numerator, denominator)
    below = wide if rounding_matters(work, N, absolute) else work
    W, V = (None if t is None else t.to(dtype) for t, dtype in ((numerator, work), (denominator, below)))
    (n_p, n_q), stacked = _accumulators(M, N, absolute), absolute and N > 0
    saved = torch.empty(n_p + n_q if keep or stacked else 0, *out, dtype=work, device=x.device)
    y = torch.empty(out, dtype=x.dtype, device=x.device)
    for images in _blocks(x, out, n_p + n_q + 3):
        power = z = x[images].to(below).contiguous()
        kept, p, q = saved[:, images], list[Tensor](), list[Tensor]()
        for k in range(1, max(M, N) + 1):
            power = power if k == 1 else power * z
            for side, weight in ((p, W), (q, V)):
                if weight is not None and k <= len(weight):
                    term = _convolution(power.to(weight.dtype), weight[k - 1], None, *geometry)
                    if stacked and weight is V:
                        kept[n_p + k - 1] = term
                        continue
                    if len(side) == 2:  # the sum of all terms but the last, which will be another
                        side[:] = [side[0].to(wide) + side[1]]
                    side.append(term.contiguous())
        maps = [t.flatten(2) for t in p], kept[n_p:].flatten(3) if stacked else [t.flatten(2) for t in q]
        keeping = kept.flatten(3) if keep and N else None
        _pade_triton.forward(*maps, bias, y[images].flatten(2), keeping, eps if N > 1 else 0.0)
    return y, saved if keep else saved.new_empty(0, *out)


@without_autocast
@torch.no_grad()
def _backward(
    dy: Tensor,
    x: Tensor,
    numerator: Tensor | None,
    denominator: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    absolute: bool,
    eps: float,
    keep: bool,
    needed: list[bool],
    triton: bool = False,
) -> list[Tensor]:
    """Gradients of x, numerator, denominator and bias; one that is not needed comes back without elements."""
    M, N = _degree(numerator), _degree(denominator)
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    if N and not keep:  # a graph of the op without gradients, differentiated after all
        saved = _forward(x, numerator, denominator, bias, *geometry, absolute, eps, True, triton)[1]
    wide, work = compute_dtype(x, numerator, denominator), _work_dtype(triton, x, numerator, denominator)
    n_p, w0 = _accumulators(M, N, absolute)[0], _constant(bias, saved)
    dx = empty_if(needed[0], x, x)
    sides: list[tuple[Tensor, Tensor, bool]] = []  # weights, their gradient, whether it is needed
    for weight, need in ((numerator, needed[1]), (denominator, needed[2])):
        if weight is not None:
            total = torch.zeros(weight.shape if need else (0,), dtype=wide, device=x.device)
            sides.append((weight.to(work), total, need))
    d_bias = torch.zeros(dy.shape[1] if needed[3] else 0, dtype=wide, device=x.device)
    for images in _blocks(x, dy.shape, len(saved) + 6):
        z, above, kept = x[images].to(work).contiguous(), dy[images].to(work), saved[:, images]
        if triton and N:
            from archzoo.kernels import _pade_triton

            maps = above.flatten(2), kept.flatten(3), bias, M, N
            d, of_bias = _pade_triton.backward(*maps, absolute, eps if N > 1 else 0.0, work, needed[3])
            d = _pade.TermGradients(*(t.unflatten(-1, dy.shape[2:]) for t in d))
            if of_bias is not None:
                d_bias += of_bias
        elif N == 0:
            d = _pade.TermGradients(above, above, above, above)
        elif absolute:
            d = _pade.absolute_backward(above, kept[0] if M else w0, kept[n_p:])
        else:
            d = _pade.smooth_backward(above, *_unpack(kept, M, N, w0), eps if N > 1 else 0.0)
        if needed[3] and not (triton and N):
            d_bias += (d.p_low if M else d.p).sum((0, 2, 3), dtype=wide)
        terms = []
        if numerator is not None:
            terms.append([d.p_low] * (M - 1) + [d.p])
        if denominator is not None:
            terms.append(list(d.q.unbind()) if absolute else [d.q_low] * (N - 1) + [d.q])
        below: Tensor | None = None
        lower = power = z  # x^{k-1}, once there is one, and x^k
        for k in range(1, max(M, N) + 1):
            if k > 1:
                lower, power = power, power * z
            through: Tensor | None = None
            for d_terms, (weight, total, need) in zip(terms, sides, strict=True):
                if k <= len(d_terms) and (need or needed[0]):
                    wanted = [needed[0], need, False]
                    d_power, d_weight, _ = _convolution_backward(
                        d_terms[k - 1], power, weight[k - 1], None, *geometry, wanted
                    )
                    if need:
                        total[k - 1] += d_weight
                    if needed[0]:
                        through = d_power.to(wide) if through is None else through.add_(d_power)
            if through is not None:
                below = through if below is None else below.addcmul_(lower, through, value=k)
        if below is not None:
            dx[images] = below
    gradients = iter(sides)
    d_numerator, d_denominator = (
        empty_if(False, None, x) if weight is None else next(gradients)[1].to(weight.dtype)
        for weight in (numerator, denominator)
    )
    return [dx, d_numerator, d_denominator, d_bias.to(x.dtype if bias is None else bias.dtype)]


def _fake(
    x: Tensor,
    numerator: Tensor | None,
    denominator: Tensor | None,
    bias: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    *geometry, absolute, _, keep, triton = options if len(options) == 10 else (*options, False)
    out = _out_shape(x.shape, _weights(numerator, denominator).shape, *geometry)
    kept = sum(_accumulators(_degree(numerator), _degree(denominator), absolute)) if keep else 0
    return x.new_empty(out), x.new_empty((kept, *out), dtype=_work_dtype(triton, x, numerator, denominator))


def _definition(
    x: Tensor, numerator: Tensor | None, denominator: Tensor | None, bias: Tensor | None, *options: Any
) -> Tensor:
    *own, _ = options  # the last is whether accumulators are kept
    return without_autocast(paon_conv2d_reference)(x, numerator, denominator, bias, *own)


paon_conv2d_op = DifferentiableOp(
    "paon_conv2d", _forward, _backward, fake=_fake, definition=_definition, tensors=4, kept=1
)


def _term_flops(x: Sequence[int], weight: Sequence[int], out: Sequence[int], transposed: bool) -> int:
    """Of one degree of one side: every weight meets every pixel put out, or put in if transposed."""
    pixels = x if transposed else out
    return 2 * prod(weight[1:]) * pixels[0] * pixels[2] * pixels[3]


@flop_formula(torch.ops.archzoo.paon_conv2d)
def _flops(x: Any, numerator: Any, denominator: Any, bias: Any, *options: Any, out_shape: Any, **kwargs: Any) -> int:
    M, N = _degree(numerator), _degree(denominator)
    transposed, absolute, out = options[3], options[6], out_shape[0]
    rational = 0 if N == 0 else 2 * N + 1 if absolute else 5 if N == 1 else 8  # as in `paon_linear`
    convolutions = (M + N) * _term_flops(x, _weights(numerator, denominator), out, transposed)
    return convolutions + (max(M, N) - 1) * prod(x) + rational * prod(out)


@flop_formula(torch.ops.archzoo.paon_conv2d_backward)
def _backward_flops(
    dy: Any, x: Any, numerator: Any, denominator: Any, bias: Any, saved: Any, *options: Any, **kwargs: Any
) -> int:
    M, N = _degree(numerator), _degree(denominator)
    transposed, absolute, needed = options[3], options[6], options[9]
    convolutions = needed[0] * (M + N) + needed[1] * M + needed[2] * N
    powers = (1 + 2 * needed[0]) * (max(M, N) - 1) * prod(x)
    rational = 0 if N == 0 else 4 * N + 4 if absolute else 13 if N == 1 else 21
    term = _term_flops(x, _weights(numerator, denominator), dy, transposed)
    return convolutions * term + powers + (rational + needed[3]) * prod(dy)


def _call(
    x: Tensor,
    numerator: Tensor | None,
    denominator: Tensor | None,
    bias: Tensor | None,
    geometry: Geometry,
    variant: str,
    eps: float,
) -> Tensor:
    """Checks, autocast and leading dimension of the two public functions."""
    weights = [(name, w) for name, w in (("numerator", numerator), ("denominator", denominator)) if w is not None]
    if not weights:
        raise ValueError("numerator=None, denominator=None: one of them must be given")
    if variant not in ("smooth", "absolute"):
        raise ValueError(f"variant={variant!r}: must be 'smooth' or 'absolute'")
    transposed, groups = geometry[3], geometry[5]
    for name, w in weights:
        if w.dim() != 5 or w.shape[0] == 0 or w.shape[1:] != weights[0][1].shape[1:]:
            layout = (
                "(degree, in, out/groups, height, width)" if transposed else "(degree, out, in/groups, height, width)"
            )
            raise ValueError(f"{name} has shape {tuple(w.shape)}: must be {layout}, degree >= 1, alike on both sides")
    weight = weights[0][1]
    check_input(x, weight.shape[1] if transposed else weight.shape[2] * groups)
    images = x if x.dim() == 4 else x.unsqueeze(0)
    out = _out_shape(images.shape, weight.shape, *geometry)
    if bias is not None and bias.shape != (out[1],):
        raise ValueError(f"bias has shape {tuple(bias.shape)}: must be ({out[1]},)")
    if transposed and min(out[2:]) < 1:
        raise ValueError(f"padding={tuple(geometry[1])}: leaves no pixel of the output of x of shape {tuple(x.shape)}")
    check_output(x, out[2:])

    dtype = autocast_dtype(x)
    if dtype != x.dtype:
        images = images.to(dtype)
        numerator, denominator, bias = (None if t is None else t.to(dtype) for t in (numerator, denominator, bias))
    absolute = variant == "absolute"
    if denominator is None and numerator is not None and len(numerator) == 1:
        y = torch.convolution(images, numerator[0], bias, *geometry)
    elif under_transform():
        refuse_triton("paon_conv2d", "a torch.func transform")
        y = paon_conv2d_reference(images, numerator, denominator, bias, *geometry, absolute, eps)
    else:
        tensors = {"x": images, "numerator": numerator, "denominator": denominator, "bias": bias}
        triton, keep = takes_triton("paon_conv2d", prod(out), **tensors), _wants_gradient(*tensors.values())
        y = paon_conv2d_op(*tensors.values(), *geometry, absolute, eps, keep, triton)
    return y if x.dim() == 4 else y.squeeze(0)


def paon_conv2d(
    x: Tensor,
    numerator: Tensor | None,
    denominator: Tensor | None,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    variant: Literal["smooth", "absolute"] = "smooth",
    eps: float = 1e-6,
) -> Tensor:
    """Padé neurons of degrees [M/N] on every patch of x.

    Args:
        x: (B, C, H, W) or (C, H, W).
        numerator: W (M, O, C/groups, kh, kw), degree k at index k - 1; None for M = 0.
        denominator: V (N, O, C/groups, kh, kw); None for N = 0.
        bias: w_0 (O,), or None for 0.
        stride: Pixels from one output to the next, down and across.
        padding: Zeros added on both sides, down and across.
        dilation: Pixels between taps, down and across.
        groups: Into how many groups channels and outputs are divided.
        variant: "smooth" or "absolute".
        eps: Added to the smooth variant's denominator if N >= 2.

    Returns:
        (B, O, H', W') or (O, H', W') in the dtype of x, or in autocast's. [1/0] is `F.conv2d`, bit for bit.

    Raises:
        ValueError: If there is neither numerator nor denominator, the variant is unknown, shapes do not fit, the kernel
            spans more than the padded input, or x is not of a floating-point dtype; as `takes_triton`.
        RuntimeError: Inside `use_backend("triton")`, under a `torch.func` transform.
    """
    geometry = (list(stride), list(padding), list(dilation), False, [0, 0], groups)
    return _call(x, numerator, denominator, bias, geometry, variant, eps)


def paon_conv_transpose2d(
    x: Tensor,
    numerator: Tensor | None,
    denominator: Tensor | None,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    output_padding: tuple[int, int] = (0, 0),
    groups: int = 1,
    dilation: tuple[int, int] = (1, 1),
    variant: Literal["smooth", "absolute"] = "smooth",
    eps: float = 1e-6,
) -> Tensor:
    """The same with transposed convolutions, which put out about `stride` times as many pixels each way.

    Args:
        x: (B, C, H, W) or (C, H, W).
        numerator: W (M, C, O/groups, kh, kw), degree k at index k - 1; None for M = 0.
        denominator: V (N, C, O/groups, kh, kw); None for N = 0.
        bias: w_0 (O,), or None for 0.
        stride: Pixels of the output from one input to the next, down and across.
        padding: Pixels cut off the output on both sides, down and across.
        output_padding: Pixels added to the output at the bottom and on the right.
        groups: Into how many groups channels and outputs are divided.
        dilation: Pixels between taps, down and across.
        variant: "smooth" or "absolute".
        eps: Added to the smooth variant's denominator if N >= 2.

    Returns:
        (B, O, H', W') or (O, H', W') in the dtype of x, or in autocast's. [1/0] is `F.conv_transpose2d`, bit for bit.

    Raises:
        ValueError: As `paon_conv2d`.
        RuntimeError: As `paon_conv2d`.
    """
    geometry = (list(stride), list(padding), list(dilation), True, list(output_padding), groups)
    return _call(x, numerator, denominator, bias, geometry, variant, eps)
