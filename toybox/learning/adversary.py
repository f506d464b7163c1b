"""Patch discriminator beside the autoencoder (Isola et al., 2017; Rombach et al., 2022, appendix
G).

Squared errors blur details that a latent does not determine: an eye of three pixels, the far
squares of a checkerboard. The discriminator judges whether each patch is a render or drawn, and the
decoder learns to draw patches that pass as renders.

    adversary = Adversary(weight=0.3)
    loss = loss + adversary.verdict(loss, y, decoder.conv_out.weight)
    adversary.step(x, y)
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from toybox.learning.channels_last import replace_group_norms, to_channels_last
from toybox.learning.training import MasterWeights

__all__ = ["Adversary", "build_discriminator"]

WIDTHS = (32, 64, 96)


def build_discriminator() -> nn.Sequential:
    """pixels (N,3,H,W) -> logits (N,1,H/4,W/4) of patches 23 px wide: above 0 for a render."""
    first, second, third = WIDTHS
    return nn.Sequential(
        nn.Conv2d(3, first, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(first, second, 4, stride=2, padding=1),
        nn.GroupNorm(8, second),
        nn.LeakyReLU(0.2),
        nn.Conv2d(second, third, 3, padding=1),
        nn.GroupNorm(8, third),
        nn.LeakyReLU(0.2),
        nn.Conv2d(third, 1, 3, padding=1),
    )


class Adversary:
    """Discriminator with its optimizer. Its gradient at the decoder's last layer is `weight` times
    that of the other losses (Esser et al., 2021, equation 7)."""

    def __init__(self, weight: float, device: str = "cpu"):
        self.weight = weight
        self.network = replace_group_norms(build_discriminator()).to(device)
        self.weights = MasterWeights(self.network, adamw_lr=1e-3, muon_lr=0.02)

    def compute_loss_term(self, loss: Tensor, y: Tensor, last: Tensor) -> Tensor:
        """Compute the term to add to the loss for drawn pictures y (N,3,H,W); `last` is the
        decoder's last weight."""
        self.network.requires_grad_(False)
        doubt = -self.network(y).float().mean()
        self.network.requires_grad_(True)
        pulls = [
            torch.autograd.grad(part, last, retain_graph=True)[0].float().norm()
            for part in (loss, doubt)
        ]
        return self.weight * (pulls[0] / (pulls[1] + 1e-4)).clamp(max=1e4) * doubt

    def step(self, x: Tensor, y: Tensor, rate: float = 1.0) -> float:
        """Train on renders x and drawn pictures y, (N,3,H,W) each, by the hinge loss (Lim and Ye,
        2017), which is returned."""
        logits = self.network(to_channels_last(torch.cat([x, y.detach()]))).float()
        real, generated = logits.chunk(2)
        loss = (relu(1 - real).mean() + relu(1 + generated).mean()) / 2
        loss.backward()
        self.weights.step(rate)
        return float(loss.detach())
