"""Messages of autograd, as different versions and devices word them, and what they are turned into."""

from __future__ import annotations

import pickle

import pytest

from lightning_rmt.curvature.errors import CurvatureError, SecondDerivativeError, explain


@pytest.mark.parametrize(
    ("message", "operation"),
    [
        (
            "derivative for aten::_scaled_dot_product_flash_attention_for_cpu_backward is not implemented",
            "_scaled_dot_product_flash_attention_for_cpu_backward",
        ),
        (
            "derivative for aten::_scaled_dot_product_efficient_attention_backward is not implemented",
            "_scaled_dot_product_efficient_attention_backward",
        ),
        ("the derivative for '_embedding_bag_backward' is not implemented.", "_embedding_bag_backward"),
        (
            "Trying to backward through flash_attn._flash_attn_backward.default but no autograd formula was registered. "
            "Please use register_autograd to add one.",
            "flash_attn._flash_attn_backward",
        ),
        ("torch.compile with aot_autograd does not currently support double backward", "torch.compile"),
        (
            "This backward function was compiled with non-empty donated buffers which requires create_graph=False",
            "torch.compile",
        ),
        (
            "Double backwards is not supported for CuDNN RNNs due to limitations in the cuDNN API. To run double "
            "backwards, please disable the CuDNN backend temporarily while running the forward pass of your RNN.",
            "_cudnn_rnn_backward",
        ),
    ],
)
def test_missing_second_derivatives(message, operation):
    error = explain(RuntimeError(message))
    assert isinstance(error, SecondDerivativeError)
    assert error.operation == operation
    assert operation in str(error)


def test_every_message_says_what_to_do():
    assert "use_reentrant=False" in str(
        explain(RuntimeError("When use_reentrant=True, torch.utils.checkpoint is incompatible with .grad()"))
    )
    assert "clone them" in str(explain(RuntimeError("Inference tensors cannot be saved for backward.")))
    assert "cudnn.flags" in str(explain(RuntimeError("Double backwards is not supported for CuDNN RNNs")))
    assert "force_eager" in str(explain(RuntimeError("does not currently support double backward")))


def test_other_errors_pass_as_they_are():
    assert explain(RuntimeError("CUDA out of memory")) is None
    assert explain(CurvatureError("the derivative for 'x' is not implemented")) is None


def test_crosses_a_process_boundary():
    error = SecondDerivativeError("some_op", "Do this.")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.operation, copy.remedy, str(copy)) == ("some_op", "Do this.", str(error))
