"""Lion against its formulas in fp64."""

import torch

from llmtrain.optim.lion import Lion


def test_five_steps_are_those_of_the_formulas() -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(6, 5, dtype=torch.float64, generator=generator)
    parameter = torch.nn.Parameter(start.clone())
    lr, decay, beta1, beta2 = 0.1, 0.3, 0.95, 0.98
    groups = [{"params": [parameter], "weight_decay": decay}]
    optimizer = Lion(groups, lr=lr, betas=(beta1, beta2))
    weight, moment = start.clone(), torch.zeros_like(start)
    for number in range(5):
        gradient = torch.randn(6, 5, dtype=torch.float64, generator=generator)
        parameter.grad = gradient.clone()
        divisor = 1.0 + number
        optimizer.grad_scale = torch.tensor(divisor)  # type: ignore[attr-defined]
        optimizer.step()

        direction = (beta1 * moment + (1 - beta1) * gradient / divisor).sign()
        weight = weight - lr * (direction + decay * weight)
        moment = beta2 * moment + (1 - beta2) * gradient / divisor
        assert torch.allclose(parameter, weight, rtol=0, atol=1e-14)
        assert torch.allclose(optimizer.state[parameter]["exp_avg"], moment, rtol=0, atol=1e-14)


def test_where_nothing_ever_flowed_only_decay_moves() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = Lion([{"params": [parameter], "weight_decay": 0.5}], lr=0.1)
    parameter.grad = torch.tensor([0.0, 1.0, -1.0])
    optimizer.step()
    assert torch.allclose(parameter, torch.tensor([0.95, 0.85, 1.05]))
