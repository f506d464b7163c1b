"""Computes cross-attention's frozen to_k and to_v without their weights on the device.

They compute W0·c of a text c. While the text encoders are frozen, c depends only on the prompt, so W0·c is
computed once per prompt and kept on the host, as are the weights. A pass of the UNet copies the products of its
prompts to the device. In SDXL's UNet in half precision the weights take 0.63 GiB, and W0·c of a prompt 0.024.
For a text that is not a known prompt's (a picture needs its prompt and the empty one together) the weights are
copied to the device, one after the other, at its first denoising step.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreambooth_moslora.core.config.targets import is_text_projection
from dreambooth_moslora.core.process import page_out

__all__ = ["TextProducts", "TextProjection"]


class TextProjection(nn.Linear):
    """A frozen projection (out,in) of the text. `host_weight` has the numbers; `weight`, which is NaN, only has
    their shape, dtype and device. `of_attention` (B,T,â¦) is the product of this layer beside those of its `siblings`,
    the number of text projections of its attention."""

    siblings = 1

    def __init__(self, dense: nn.Linear, products: "TextProducts"):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = dense.in_features, dense.out_features, dense.bias
        self.host_weight = dense.weight.detach()
        if products.device.type != "meta":
            self.host_weight = self.host_weight.cpu()
        nothing = torch.full((), torch.nan, dtype=dense.weight.dtype, device=products.device)
        self.register_buffer("weight", nothing.expand(dense.weight.shape), persistent=False)
        self.products = products
        self.text: Tensor | None = None
        self.product: Tensor | None = None
        self.of_attention: Tensor | None = None

    def forward(self, text: Tensor) -> Tensor:
        """(B,T,in) -> (B,T,out), a view of columns. No gradient reaches the text."""
        if text is not self.text:
            self.products.take(text)
        return self.product


class TextProducts:
    """Moves the dense text projections of `unet` off the device, and provides their products with each text there."""

    def __init__(self, unet: nn.Module, device: torch.device):
        self.device = device
        self.attentions: dict[str, list[TextProjection]] = {}
        self._kept: dict[str, Tensor] = {}
        paths = [path for path, layer in unet.named_modules() if is_text_projection(path) and type(layer) is nn.Linear]
        for path in paths:
            parent, _, name = path.rpartition(".")
            layer = TextProjection(unet.get_submodule(path), self)
            setattr(unet.get_submodule(parent), name, layer)
            self.attentions.setdefault(parent, []).append(layer)
        self.layers = [layer for layers in self.attentions.values() for layer in layers]
        for layers in self.attentions.values():
            for layer in layers:
                layer.siblings = len(layers)

    def keep(self, prompt: str, products: Tensor) -> None:
        """Keep the concatenated `products` (T, all outputs) of the layers with the text of `prompt`."""
        self._kept[prompt] = products.pin_memory() if self.device.type == "cuda" else products

    @torch.no_grad()
    def show(self, text: Tensor, prompts: Sequence[str]) -> None:
        """Prepare passes with exactly this tensor `text` (B,T,in), on the device, of B `prompts`."""
        for prompt, row in zip(prompts, text, strict=True):
            if prompt not in self._kept:
                self.keep(prompt, self._computed(row).cpu())
        rows = [self._kept[prompt] for prompt in prompts]
        shown = torch.empty(len(rows), *rows[0].shape, dtype=rows[0].dtype, device=self.device)
        for place, row in enumerate(rows):
            shown[place].copy_(row, non_blocking=self.device.type == "cuda")
        self._lend(text, shown)

    def take(self, text: Tensor) -> None:
        """Prepare passes with a `text` (B,T,in) of unknown prompts."""
        self._lend(text, self._computed(text))

    def _lend(self, text: Tensor, products: Tensor) -> None:
        attentions = [(layers, [layer.out_features for layer in layers]) for layers in self.attentions.values()]
        parts = products.split([sum(widths) for _, widths in attentions], -1)
        for (layers, widths), part in zip(attentions, parts, strict=True):
            for layer, own in zip(layers, part.split(widths, -1), strict=True):
                layer.text, layer.product, layer.of_attention = text, own, part

    @torch.no_grad()
    def _computed(self, text: Tensor) -> Tensor:
        """(…,T,in) -> (…,T, all outputs)."""
        found = []
        for layer in self.layers:
            found.append(F.linear(text, layer.host_weight.to(text.device, text.dtype), layer.bias))
            page_out(layer.host_weight)
        return torch.cat(found, -1)
