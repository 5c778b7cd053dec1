"""Frozen linear layers of the LLM in float8: half the bytes of bfloat16, and on sm_89 and newer twice the arithmetic.

A weight (O, C) is rounded once to e4m3 with a scale per output row. Inputs (T, C) are rounded per row when they come:
the product is ``(codes_x @ codes_w.T) * scale_x * scale_w``. In the backward pass the contraction is over the output
rows; their scales are multiplied into the gradient (T, O) before it is rounded per row. So one set of codes serves both
directions, and the gradient is of the very weights that the forward pass used. There is no gradient of the weights:
they are frozen.

Why not torchao: its ``Float8Linear`` (0.18) keeps the weight in bfloat16 and rounds it anew in every call, and its
backward pass computes the weight's gradient also of a frozen weight, a third of the arithmetic of a step. What it has
that stores float8 has no backward pass.

The switch is of training alone. What is evaluated is the adapter on the base in ``model.dtype``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunetune.configs import ConfigError
from prunetune.pruning.families import family_of
from prunetune.train import float8_triton

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""Of e4m3."""
LEAST = 1e-30
"""A row whose largest magnitude is below this is scaled as if it were this, so that zeros stay zeros."""
STEP = 16
"""Both sides of a weight are multiples of this: what the products on a GPU ask for."""


@dataclass(frozen=True)
class Float8Report:
    """What was converted.

    Attributes:
        names: of the linear layers, below the model.
        bytes_before: of their weights as they were loaded.
        bytes_after: of the codes and scales that stand for them.
        emulated: whether products are computed in float32 on the rounded numbers.
    """

    names: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    emulated: bool

    def line(self) -> str:
        """Return it in words, as printed before training."""
        before, after = self.bytes_before / 2**30, self.bytes_after / 2**30
        how = ", emulated in float32" if self.emulated else ""
        return f"{len(self.names)} frozen linear layers of the LLM in e4m3{how}: {before:.2f} -> {after:.2f} GiB"

    def record(self) -> dict[str, Any]:
        """Return what a run's record says of it."""
        return {"format": "e4m3", "layers": len(self.names), "emulated": self.emulated}


def round_rows(values: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return a matrix in float8, and the scale of each row: ``codes * scales`` are the rounded numbers.

    Args:
        values: (T, C) of any floating dtype.
        factors: (C,) float32 that the columns are multiplied by before they are rounded.

    Returns:
        codes (T, C) in e4m3 and scales (T, 1) in float32. A row with a NaN or an infinite number becomes NaN.
    """
    if float8_triton.usable(values):
        return float8_triton.round_rows(values, factors, LARGEST, LEAST)
    numbers = values.float()
    if factors is not None:
        numbers = numbers * factors
    scales = numbers.abs().amax(dim=1, keepdim=True).clamp_min(LEAST) / LARGEST
    return (numbers / scales).to(E4M3).contiguous(), scales


def product(
    left: Tensor, left_scales: Tensor, right: Tensor, right_scales: Tensor, dtype: torch.dtype, emulated: bool
) -> Tensor:
    """Return ``left @ right.T`` of two rounded matrices.

    Args:
        left: (T, C) codes.
        left_scales: (T, 1).
        right: (O, C) codes.
        right_scales: (O, 1).
        dtype: of the result.
        emulated: multiply the rounded numbers in float32 instead of the codes.

    Returns:
        (T, O).
    """
    if emulated:
        return ((left.float() * left_scales) @ (right.float() * right_scales).t()).to(dtype)
    if left.is_cuda:
        # What the hardware takes: the contraction contiguous on both sides, and bfloat16 out where scales are by row.
        right = right.contiguous()
        out = torch._scaled_mm(
            left, right.t(), left_scales, right_scales.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return out.to(dtype)
    return torch._scaled_mm(left, right.t(), left_scales, right_scales.t(), out_dtype=dtype)


class _FrozenProduct(torch.autograd.Function):
    """``x @ w.T`` whose gradient reaches x alone; of x nothing is kept."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, codes: Tensor, scales: Tensor, turned: Tensor, emulated: bool) -> Tensor:
        ctx.save_for_backward(codes, scales, turned)
        ctx.emulated, ctx.dtype = emulated, inputs.dtype
        return product(*round_rows(inputs), codes, scales, inputs.dtype, emulated)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        codes, scales, turned = ctx.saved_tensors
        rounded, row_scales = round_rows(gradient, scales.flatten())
        if not len(turned):
            turned = codes.t()
        ones = torch.ones(len(turned), 1, device=gradient.device)
        return product(rounded, row_scales, turned, ones, ctx.dtype, ctx.emulated), None, None, None, None


class Float8Linear(nn.Module):
    """A frozen linear layer whose weight is held once, in float8.

    Codes and scales are buffers of bytes: casting the model to another dtype, which DeepSpeed does, leaves them alone.
    They are in no state dict; the base's files have the weights.

    Args:
        linear: what it stands for; its bias, if it has one, is kept as it is.
        emulated: multiply in float32, for devices without float8 products.
        keep_transposed: hold the codes a second time as the backward pass reads them, which on a GPU would be copied
            in every step else: as many bytes as bfloat16 in all.
        device: where the weight is rounded and stays; None is where it is.
    """

    code_bytes: Tensor
    scale_bytes: Tensor
    turned_bytes: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        emulated: bool = False,
        keep_transposed: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.emulated = emulated
        weight = linear.weight.detach().to(device)  # type: ignore[arg-type] # None leaves it where it is
        codes, scales = round_rows(weight)
        turned = codes.t().contiguous() if keep_transposed else codes[:0]
        self.register_buffer("code_bytes", codes.view(torch.uint8), persistent=False)
        self.register_buffer("scale_bytes", scales.view(torch.uint8), persistent=False)
        self.register_buffer("turned_bytes", turned.view(torch.uint8), persistent=False)
        self.bias = linear.bias

    @property
    def codes(self) -> Tensor:
        """(O, C) in e4m3."""
        return self.code_bytes.view(E4M3)

    @property
    def scales(self) -> Tensor:
        """(O, 1) in float32."""
        return self.scale_bytes.view(torch.float32)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (..., O) of inputs (..., C), in their dtype."""
        rows = inputs.reshape(-1, self.in_features)
        turned = self.turned_bytes.view(E4M3)
        outputs = _FrozenProduct.apply(rows, self.codes, self.scales, turned, self.emulated)
        if self.bias is not None:
            outputs = outputs + self.bias.to(outputs.dtype)
        return outputs.view(*inputs.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Say the sizes, as :class:`torch.nn.Linear` does."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def frozen_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the linear layers that the switch is about, by name: the LLM's, without its output layer.

    Vision tower, projector, embeddings and output layer stay: what is chosen, what is tuned, and what answers are read
    from. So do layers of other kinds, such as a mixture's experts in one tensor.
    """
    language_model = family_of(model).llm(model)
    output = model.get_output_embeddings()
    kept = {id(output)}
    for projector in family_of(model).projectors:
        kept |= {id(module) for module in model.base_model.get_submodule(projector).modules()}
    inside = {id(module) for module in language_model.modules()} - kept
    found = {}
    for name, module in model.named_modules():
        if id(module) in inside and type(module) is nn.Linear and not module.weight.requires_grad:
            found[name] = module
    return found


def use_float8(
    model: PreTrainedModel,
    emulated: bool = False,
    keep_transposed: bool = False,
    device: torch.device | str | None = None,
) -> Float8Report:
    """Put the frozen linear layers of the LLM into float8, in place.

    Args:
        model: after everything but the projector was frozen.
        emulated: see :class:`Float8Linear`.
        keep_transposed: the same.
        device: the same; a GPU rounds 7B weights in a second, a CPU in a minute.

    Raises:
        ConfigError: if there is no such layer, or one has a side that float8 products do not take.
    """
    linears = frozen_linears(model)
    if not linears:
        raise ConfigError("engine.float8: the LLM has no frozen linear layer; set engine.float8 to false")
    before = after = 0
    for name, linear in linears.items():
        if linear.in_features % STEP or linear.out_features % STEP:
            raise ConfigError(
                f"engine.float8: {name} is {linear.out_features} x {linear.in_features}, and float8 products need "
                f"multiples of {STEP}; set engine.float8 to false"
            )
    for name, linear in linears.items():
        before += linear.weight.nbytes
        parent, _, last = name.rpartition(".")
        layer = Float8Linear(linear, emulated, keep_transposed, device)
        setattr(model.get_submodule(parent), last, layer)
        after += sum(buffer.nbytes for buffer in layer.buffers())
        linears[name] = None  # type: ignore[assignment] # one weight at a time: its memory is free before the next
    return Float8Report(tuple(linears), before, after, emulated)


def float8_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return codes and scales by name: what training must not change, beside the frozen parameters."""
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, Float8Linear):
            tensors |= {f"{name}.codes": module.code_bytes, f"{name}.scales": module.scale_bytes}
    return tensors


def check_float8(quantization: str | None, stage: int, dtype: str) -> None:
    """Check that ``engine.float8`` goes with the rest of a run's options, before anything is loaded.

    Args:
        quantization: ``model.quantization``.
        stage: of ZeRO.
        dtype: ``model.dtype``.

    Raises:
        ConfigError: naming what it does not go with.
    """
    if quantization is not None:
        raise ConfigError(
            f"engine.float8: model.quantization {quantization} has rounded the weights already; leave one of them out"
        )
    if stage == 3:
        raise ConfigError(
            "engine.float8: ZeRO-3 partitions parameters, and float8 weights are none; set train.deepspeed to zero2, "
            "or engine.float8 to false"
        )
    if dtype == "float16":
        raise ConfigError("engine.float8 computes in bfloat16, got model.dtype float16; set it to bfloat16")


def check_float8_device(device: torch.device | str) -> None:
    """Check that a device multiplies in float8; raises ConfigError. On a GPU this begins to use it."""
    if not has_float8_products(device):
        raise ConfigError(
            f"engine.float8: this device ({_device_name(device)}) has no float8 products; they need an NVIDIA GPU of "
            "compute capability 8.9 or newer; set engine.float8 to false"
        )


def has_float8_products(device: torch.device | str) -> bool:
    """Return whether PyTorch multiplies float8 matrices with scales by row on a device; a small product is tried."""
    codes, scales = torch.zeros(STEP, STEP, device=device).to(E4M3), torch.ones(STEP, 1, device=device)
    try:
        product(codes, scales, codes, scales, torch.bfloat16, emulated=False)
    except (RuntimeError, NotImplementedError, AttributeError):  # of a kind for every build
        return False
    return True


def _device_name(device: torch.device | str) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else str(device)
