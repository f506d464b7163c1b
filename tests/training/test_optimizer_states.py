"""States of a checkpoint go on as the same numbers, however their tensors lie in the file."""

from io import BytesIO

import pytest
import torch

from dreambooth_moslora.training.optimizer import checked_states

SHAPE = (48, 32)


def after_one_step() -> torch.optim.AdamW:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(SHAPE, generator=generator)) for _ in range(2)]
    optimizer = torch.optim.AdamW(params, lr=0.1, fused=True)
    for param in params:
        param.grad = torch.randn(SHAPE, generator=generator)
    optimizer.step()
    return optimizer


def gone_on(moments: list[torch.Tensor]) -> list[torch.Tensor]:
    """The parameters after one more step, from a file with these first moments."""
    optimizer, file = after_one_step(), BytesIO()
    states = optimizer.state_dict()
    for number, moment in enumerate(moments):
        states["state"][number]["exp_avg"] = moment
    torch.save(states, file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    optimizer.load_state_dict(checked_states(read, optimizer, step=1, exact=True))
    optimizer.step()
    return [param.detach() for param in optimizer.param_groups[0]["params"]]


LAYOUTS = {
    "transposed": lambda one, other: [one.T.contiguous().T, other],
    "every second number": lambda one, other: [one.repeat_interleave(2, 1)[:, ::2], other],
    "one number for all": lambda one, other: [one[:1, :1].expand(SHAPE), other],
    "one tensor for both parameters": lambda one, other: [one, one],
    "a sign that is only noted": lambda one, other: [torch._neg_view(one), other],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_in_the_file_changes_no_number(name):
    """The fused kernel takes each moment for a dense one: it read and wrote beyond the end of an expanded one."""
    generator = torch.Generator().manual_seed(1)
    moments = LAYOUTS[name](*(torch.randn(SHAPE, generator=generator) for _ in range(2)))
    dense = [torch.tensor(moment.tolist()) for moment in moments]
    for found, expected in zip(gone_on(moments), gone_on(dense), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
