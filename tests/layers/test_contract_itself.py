"""The contract's tests are tested: they notice broken layers, and do not accuse sound ones."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from archzoo.registry import Card, LayerEntry
from tests.layers import test_contract_building as building
from tests.layers import test_contract_card as card
from tests.layers import test_contract_gradients as gradients
from tests.layers import test_contract_inputs as inputs
from tests.layers import test_contract_tools as tools
from tests.layers import test_contract_trainer as trainer
from tests.layers.contract import Case


class _Attention(nn.Module):
    """A mixer with nothing wrong."""

    def __init__(self, dim: int, *, device: Any = None, dtype: Any = None):
        super().__init__()
        self.dim = dim
        self.qkv = nn.Linear(dim, 3 * dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        self.qkv.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"input of shape {tuple(x.shape)}: must be (batch, length, {self.dim})")
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.mT / self.dim).softmax(-1) @ v

    def extra_repr(self) -> str:
        return str(self.dim)


class _SwallowsNaN(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.nan_to_num())


class _MixesRows(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - (x.mean(0, keepdim=True) if x.ndim > 1 else 0))


class _WrongGradient(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * x.detach().square().sum(-1, keepdim=True)


class _ForgetsAnElement(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.empty(*x.shape[:-1], self.out_features, dtype=x.dtype)
        y[..., 1:] = super().forward(x)[..., 1:]
        return y


class _ForgetsToReset(nn.Linear):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_buffer("grid", torch.linspace(0, 1, 5))


class _WritesIntoItsInput(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        x.detach().mul_(2)
        return y


class _DrawsNumbers(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-3 * torch.rand(self.out_features, dtype=x.dtype)


class _CountsForNothing(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return (x[..., None, :] * self.weight).sum(-1) + self.bias


class _HasAnIdleParameter(nn.Linear):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.idle = nn.Parameter(torch.zeros(3))


class _IgnoresAutocast(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


def _case_of(cls: type[nn.Module], kind: Any = "linear", nonlinear: bool = False) -> Case:
    return Case(LayerEntry("toy", cls, kind, Card("-", "-", 2000, "", "y = x", "-", "-"), nonlinear))


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (_SwallowsNaN, gradients.test_nan_in_gives_nan_out_in_its_own_row),
        (_MixesRows, inputs.test_leading_dimensions_are_free),
        (_MixesRows, inputs.test_rows_do_not_mix_and_a_batch_is_the_sum_of_its_parts),
        (_WrongGradient, gradients.test_gradients_pass_gradcheck),
        (_WrongGradient, card.test_nonlinear_flag_tells_whether_an_activation_may_be_left_out),
        (_ForgetsAnElement, building.test_dtype_is_that_of_all_parameters_and_of_the_output),
        (_ForgetsToReset, building.test_a_layer_built_on_meta_can_be_filled_later),
        (_ForgetsToReset, building.test_reset_parameters_restores_all_state),
        (_ForgetsToReset, building.test_meta_device_gives_shapes_without_memory),
        (_WritesIntoItsInput, inputs.test_strides_do_not_matter_and_the_input_is_left_alone),
        (_DrawsNumbers, gradients.test_two_runs_agree_bit_for_bit),
        (_CountsForNothing, trainer.test_flops_are_counted),
        (_HasAnIdleParameter, gradients.test_every_parameter_trains),
        (_IgnoresAutocast, tools.test_autocast_follows_the_usual_layer),
        (nn.Linear, building.test_bad_sizes_are_refused_by_name),
        (nn.Linear, card.test_signature_is_the_kinds_then_keyword_only_options_then_device_and_dtype),
    ],
    ids=lambda value: value.__name__.strip("_"),
)
def test_a_broken_layer_is_noticed(broken, test):
    with pytest.raises((AssertionError, RuntimeError, UserWarning, pytest.fail.Exception)):
        test(_case_of(broken))


@pytest.mark.parametrize(
    "sound",
    [_case_of(nn.Linear), _case_of(nn.Conv2d, "conv2d"), _case_of(_Attention, "mixer", nonlinear=True)],
    ids=["linear", "conv2d", "mixer"],
)
@pytest.mark.parametrize(
    "test",
    [
        card.test_nonlinear_flag_tells_whether_an_activation_may_be_left_out,
        building.test_dtype_is_that_of_all_parameters_and_of_the_output,
        building.test_meta_device_gives_shapes_without_memory,
        building.test_a_layer_built_on_meta_can_be_filled_later,
        building.test_reset_parameters_restores_all_state,
        inputs.test_leading_dimensions_are_free,
        inputs.test_empty_batch_has_gradients_of_zero,
        inputs.test_strides_do_not_matter_and_the_input_is_left_alone,
        inputs.test_rows_do_not_mix_and_a_batch_is_the_sum_of_its_parts,
        gradients.test_gradients_pass_gradcheck,
        gradients.test_double_backward_passes_gradgradcheck,
        gradients.test_every_parameter_trains,
        gradients.test_two_runs_agree_bit_for_bit,
        gradients.test_training_lowers_the_loss_and_repeats_bit_for_bit,
        gradients.test_nan_in_gives_nan_out_in_its_own_row,
        tools.test_compiled_equals_eager,
        tools.test_autocast_follows_the_usual_layer,
        tools.test_copies_are_equal_and_independent_before_and_after_use,
        trainer.test_flops_are_counted,
    ],
    ids=lambda test: test.__name__,
)
def test_a_sound_layer_of_any_kind_is_not_accused(test, sound):
    test(sound)
