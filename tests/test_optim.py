"""The optimizer, its schedule and the EMA of weights."""

import torch

from dtcache.optim import warmed_up_ema


def test_the_average_forgets_the_starting_weights() -> None:
    """The EMA's decay rises from a tenth to its limit, so that a short run forgets the start."""
    averaged = [torch.zeros(2)]
    expected = 0.0
    update = warmed_up_ema(0.9)
    for n in range(1, 200):
        update(averaged, [torch.full((2,), float(n))], torch.tensor(n))
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
        torch.testing.assert_close(averaged[0], torch.full((2,), expected), rtol=1e-4, atol=1e-4)
    assert expected > 185
