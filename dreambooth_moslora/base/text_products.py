"""Cross-attention's frozen to_k and to_v, W0·c of a text c, computed once per prompt.

`TextProducts` keeps weights and products on the host. In SDXL's UNet in half precision the weights
take 0.63 GiB, and W0·c of a prompt 0.024. For an unknown text (a picture needs its prompt and the
empty one together) the weights are copied to the device in turn.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreambooth_moslora.settings.rows import is_text_projection


class TextProjection(nn.Linear):
    """A frozen projection (out,in) of the text, whose weight is not on the device.

    host_weight: its numbers
    weight: NaN of the same shape and dtype, on the device, for those who read only these
    text, product: the last text (B,T,in) and this layer's product with it (B,T,out)
    """

    def __init__(self, dense: nn.Linear, products: "TextProducts"):
        # `nn.Linear` itself would make a weight.
        nn.Module.__init__(self)
        self.in_features = dense.in_features
        self.out_features = dense.out_features
        self.bias = dense.bias

        self.host_weight = dense.weight.detach()
        if products.device.type != "meta":
            self.host_weight = self.host_weight.cpu()

        # One NaN, expanded: it takes no memory, and a use of it shows.
        nothing = torch.full((), torch.nan, dtype=dense.weight.dtype, device=products.device)
        self.register_buffer("weight", nothing.expand(dense.weight.shape), persistent=False)

        self.products = products
        self.text: Tensor | None = None
        self.product: Tensor | None = None

    def forward(self, text: Tensor) -> Tensor:
        """(B,T,in) -> (B,T,out), a view of columns. No gradient reaches the text."""
        if text is not self.text:
            self.products.take(text)
        return self.product


class TextProducts:
    """Moves the dense text projections of `unet` off the device, and provides their products with
    each text there."""

    def __init__(self, unet: nn.Module, device: torch.device):
        self.device = device
        self.layers: list[TextProjection] = []
        self._kept: dict[str, Tensor] = {}  # prompt -> products (T, all outputs)

        # Find them all before the first is replaced.
        dense = {}
        for path, layer in unet.named_modules():
            if is_text_projection(path) and type(layer) is nn.Linear:
                dense[path] = layer

        for path, linear in dense.items():
            parent, _, name = path.rpartition(".")
            layer = TextProjection(linear, self)
            setattr(unet.get_submodule(parent), name, layer)
            self.layers.append(layer)

    def keep(self, prompt: str, products: Tensor) -> None:
        """Keep the concatenated `products` (T, all outputs) of the layers with the text of
        `prompt`."""
        self._kept[prompt] = products.pin_memory() if self.device.type == "cuda" else products

    @torch.no_grad()
    def show(self, text: Tensor, prompts: Sequence[str]) -> None:
        """Prepare passes with exactly this tensor `text` (B,T,in), on the device, of B prompts."""
        # Products are computed once a prompt.
        for prompt, row in zip(prompts, text, strict=True):
            if prompt not in self._kept:
                self.keep(prompt, self._computed(row).cpu())

        # From pinned memory the copies to a GPU run beside its other work.
        rows = [self._kept[prompt] for prompt in prompts]
        shown = torch.empty(len(rows), *rows[0].shape, dtype=rows[0].dtype, device=self.device)
        for place, row in enumerate(rows):
            shown[place].copy_(row, non_blocking=self.device.type == "cuda")
        self._lend(text, shown)

    def take(self, text: Tensor) -> None:
        """Prepare passes with a `text` (B,T,in) of unknown prompts."""
        self._lend(text, self._computed(text))

    def _lend(self, text: Tensor, products: Tensor) -> None:
        """Give each layer its columns of `products` (B,T, all outputs)."""
        widths = [layer.out_features for layer in self.layers]
        for layer, product in zip(self.layers, products.split(widths, -1), strict=True):
            layer.text = text
            layer.product = product

    @torch.no_grad()
    def _computed(self, text: Tensor) -> Tensor:
        """(…,T,in) -> (…,T, all outputs)."""
        found = []
        for layer in self.layers:
            weight = layer.host_weight.to(text.device, text.dtype)
            found.append(F.linear(text, weight, layer.bias))
        return torch.cat(found, -1)
