"""Frozen linears in float8: against numbers rounded by hand, what is converted, where gradients go, what is refused."""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from qwen_world import tiny_qwen
from torch import nn

from prunetune.configs import ConfigError
from prunetune.models import wrap_projector
from prunetune.pruning.families import family_of
from prunetune.train import float8
from prunetune.train.float8 import (
    Float8Linear,
    check_float8,
    check_float8_device,
    float8_tensors,
    frozen_linears,
    round_rows,
    use_float8,
)


def e4m3_values():
    """Every finite number of the format: 4 bits of exponent with bias 7, 3 of mantissa, no infinities."""
    values = []
    for code in range(127):  # the 128th is NaN
        exponent, mantissa = code >> 3, code & 7
        values.append(mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return np.array(values)


def nearest(numbers):
    """The nearest of all values, of two equally near ones that with the even mantissa."""
    values = e4m3_values()
    flat = np.abs(numbers).reshape(-1, 1)
    distance = np.abs(flat - values)
    tied = distance == distance.min(1, keepdims=True)
    # Neighbouring codes differ in the last bit of the mantissa, so of two one is even.
    even = np.where(tied, np.arange(127) % 2, 2)
    return np.copysign(values[even.argmin(1)].reshape(numbers.shape), numbers)


def rounded(matrix):
    """Quantise and dequantise by row, in float64 but for the scale."""
    scale = (np.maximum(np.abs(matrix).max(1, keepdims=True), 1e-30) / np.float32(448)).astype(np.float32)
    return nearest((matrix / scale).astype(np.float32)) * scale.astype(np.float64)


def frozen(outputs=48, inputs=32, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)


def rows(*shape, seed=1, dtype=torch.float32):
    """Rows of very different size, one of them zero."""
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    numbers = numbers * torch.logspace(-3, 2, shape[-2])[:, None]
    numbers[..., 1, :] = 0
    return numbers.to(dtype)


def close(ours, expected, tolerance=1e-6):
    assert np.abs(ours.numpy() - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_rounded_to_the_nearest_by_row(dtype):
    values = rows(7, 64, dtype=dtype)
    codes, scales = round_rows(values)
    assert codes.dtype == torch.float8_e4m3fn and scales.shape == (7, 1)
    close((codes.float() * scales), rounded(values.float().numpy()), 1e-7)
    assert codes.float().abs().amax(1).tolist() == [448 if row != 1 else 0 for row in range(7)]


def test_what_is_no_number_stays_none():
    codes, scales = round_rows(torch.tensor([[1.0, float("nan")], [float("inf"), 1.0], [1.0, 2.0]]))
    read = codes.float() * scales
    assert read[:2].isnan().any(1).all() and read[2].isfinite().all()


@pytest.mark.parametrize("keep_transposed", [False, True])
@pytest.mark.parametrize("emulated", [True, False])
def test_product_and_gradient_are_those_of_the_rounded_numbers(emulated, keep_transposed):
    if not emulated and not float8.has_float8_products("cpu"):
        pytest.skip("no float8 products on this CPU")
    linear, inputs = frozen(), rows(2, 5, 32).requires_grad_()
    layer = Float8Linear(linear, emulated, keep_transposed)
    outputs = layer(inputs)
    weight = rounded(linear.weight.numpy())
    read = rounded(inputs.detach().reshape(10, 32).numpy())
    close(outputs.detach().reshape(10, 48), read @ weight.T + linear.bias.numpy())

    gradient = rows(2, 5, 48, seed=2)
    outputs.backward(gradient)
    codes, scales = round_rows(linear.weight)
    scaled = rounded(gradient.reshape(10, 48).numpy() * scales.flatten().numpy())
    close(inputs.grad.reshape(10, 32), scaled @ codes.float().numpy().astype(np.float64))
    # Rounding to 3 bits of mantissa: 6 % of a product's size at most, and 2 or 3 % in the mean.
    exact = gradient.reshape(10, 48) @ linear.weight
    error = (inputs.grad.reshape(10, 32) - exact).norm() / exact.norm()
    assert 1e-3 < error < 0.06


def test_a_frozen_layer_keeps_nothing_of_its_inputs_and_has_no_gradient():
    layer = Float8Linear(frozen(dtype=torch.bfloat16))
    kept = []
    inputs = rows(5, 32, dtype=torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        outputs = layer(inputs)
    assert outputs.dtype == torch.bfloat16 and not any(
        tensor.shape[-1:] == (32,) and len(tensor) == 5 for tensor in kept
    )
    outputs.sum().backward()
    assert inputs.grad is not None and inputs.grad.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in layer.parameters()) and layer.bias.grad is None


def test_stored_once_in_half_the_bytes_and_no_cast_reaches_them():
    linear = frozen(256, 512, bias=False, dtype=torch.bfloat16)
    layer = Float8Linear(linear)
    held = sum(buffer.nbytes for buffer in layer.buffers())
    assert held == 256 * 512 + 4 * 256 and not list(layer.parameters()) and not layer.state_dict()
    assert sum(b.nbytes for b in Float8Linear(linear, keep_transposed=True).buffers()) == 2 * 256 * 512 + 4 * 256
    before = layer(rows(4, 512, dtype=torch.bfloat16))
    layer.to(torch.float32).bfloat16()
    assert torch.equal(layer(rows(4, 512, dtype=torch.bfloat16)), before)


def test_exactly_the_llms_linear_layers_are_converted(model):
    expected = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".language_model." in f".{n}."}
    assert len(expected) == 7 * model.config.text_config.num_hidden_layers
    others = {n: p.clone() for n, p in model.named_parameters() if n.removesuffix(".weight") not in expected}
    wrapped = wrap_projector(model)
    report = use_float8(model, emulated=True)
    assert set(report.names) == expected == {n for n, m in model.named_modules() if isinstance(m, Float8Linear)}
    left = {name.replace(".modules_to_save.default", ""): p for name, p in wrapped.get_base_model().named_parameters()}
    assert all(torch.equal(left[name], tensor) for name, tensor in others.items())
    assert not any(name.removesuffix(".weight") in expected for name in left)
    assert {name.rsplit(".", 1)[0] for name in float8_tensors(model)} == expected
    # From float32 it is a quarter and the scales.
    assert report.bytes_after == report.bytes_before // 4 + 4 * sum(
        m.out_features for m in model.modules() if isinstance(m, Float8Linear)
    )
    assert f"{len(expected)} frozen" in report.line() and report.record()["layers"] == len(expected)


def test_a_merger_inside_the_tower_and_the_output_layer_stay():
    model = tiny_qwen().requires_grad_(False)
    found = frozen_linears(model)
    assert found and all(name.startswith("model.language_model.") for name in found)


def test_what_trains_is_left(model):
    model.requires_grad_(False)
    name, layer = next(iter(frozen_linears(model).items()))
    layer.requires_grad_(True)
    assert name not in frozen_linears(model)


def loss_and_gradient(model, batch):
    for parameter in model.parameters():
        parameter.grad = None
    loss = model(**batch).loss
    loss.backward()
    projector = getattr(model.base_model, family_of(model).projectors[0])
    return loss.item(), torch.cat([p.grad.flatten() for p in projector.parameters()])


def test_a_model_learns_nearly_the_same_and_checkpointing_changes_nothing(model, formatter, samples):
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    batch = formatter.training_batch(samples)
    loss, gradient = loss_and_gradient(model, batch)
    use_float8(model, emulated=True)
    near, rough = loss_and_gradient(model, batch)
    assert near == pytest.approx(loss, rel=0.02) and near != loss
    assert torch.cosine_similarity(gradient, rough, dim=0) > 0.97
    model.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    again, recomputed = loss_and_gradient(model, batch)
    assert again == near and torch.equal(recomputed, rough)


@pytest.fixture
def samples():
    from prunetune.data_recipes import Sample, Turn

    turns = (Turn("what color is the circle?", "red"),), (Turn("how many shapes?", "three"),)
    return [Sample(f"{i}", "gqa", f"scene:{i}", turn) for i, turn in enumerate(turns)]


def test_a_copy_of_a_converted_model_is_its_own(model):
    model.requires_grad_(False)
    use_float8(model, emulated=True)
    twin = copy.deepcopy(model)
    for name, tensor in float8_tensors(twin).items():
        assert torch.equal(tensor, float8_tensors(model)[name])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("4bit", 2, "bfloat16"), "quantization 4bit"),
        (("8bit", 2, "bfloat16"), "quantization 8bit"),
        ((None, 3, "bfloat16"), "ZeRO-3"),
        ((None, 2, "float16"), "float16"),
    ],
)
def test_what_it_does_not_go_with(arguments, said):
    with pytest.raises(ConfigError, match=said) as raised:
        check_float8(*arguments)
    assert "\n" not in str(raised.value)


def test_a_device_without_float8_products_is_named(monkeypatch):
    def absent(*arguments, **options):
        raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0 or 8.9")

    monkeypatch.setattr(torch, "_scaled_mm", absent)
    with pytest.raises(ConfigError, match=r"this device \(cpu\) has no float8 products; .* set engine.float8 to false"):
        check_float8_device("cpu")
    monkeypatch.undo()
    if float8.has_float8_products("cpu"):
        check_float8_device("cpu")
    check_float8(None, 2, "bfloat16")


def test_a_side_that_the_hardware_does_not_take_is_named_before_anything_is_changed(model):
    model.requires_grad_(False)
    layer = model.model.language_model.layers[-1].mlp
    layer.down_proj = nn.Linear(layer.down_proj.in_features, 100, bias=False).requires_grad_(False)
    with pytest.raises(ConfigError, match=r"down_proj is 100 x \d+, and float8 products need multiples of 16"):
        use_float8(model)
    assert not float8_tensors(model)


def test_a_model_without_such_layers_is_told(model):
    model.requires_grad_(True)
    with pytest.raises(ConfigError, match="no frozen linear layer"):
        use_float8(model)


KERNEL = """
from contextlib import nullcontext
import torch
from prunetune.train import float8, float8_triton
torch.cuda.device_of = lambda tensor: nullcontext()
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    values = (torch.randn(7, 100) * torch.logspace(-4, 3, 7)[:, None]).to(dtype)
    values[3] = 0
    for factors in (None, torch.rand(100) + 0.1):
        plain, scales = float8.round_rows(values, factors)
        codes, same = float8_triton.round_rows(values, factors, float8.LARGEST, float8.LEAST)
        assert torch.equal(scales, same)
        # The interpreter's own conversion loses the carry into the exponent, cuts subnormal numbers off, and rounds
        # a half away from zero.
        size = plain.float().abs()
        exact = values.float() * (1 if factors is None else factors) / scales
        halfway = (exact.view(torch.int32) & 0xFFFFF) == 0x80000
        told = (size.log2() % 1 != 0) & (size > 2**-6) & ~halfway
        assert told.sum() > 400 and torch.equal(plain.float()[told], codes.float()[told])
print("kernel agrees")
"""


def test_the_triton_kernel_equals_the_plain_version():
    """In Triton's interpreter, so without a GPU; the compiled one is checked by benchmarks/float8.py on one."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", KERNEL], env=environment, capture_output=True, text=True, timeout=300)
    assert run.stdout.strip() == "kernel agrees", run.stderr[-2000:]
