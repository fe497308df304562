"""DeiT with a distillation token.

Touvron et al., "Training data-efficient image transformers & distillation through attention" (arXiv 2012.12877,
section 4). A second token follows the cls token and has a head of its own, which learns from a teacher's labels;
the prediction is the mean of the two heads' logits. DeiT without that token is a row of VisionTransformer.
As the published code; differs from it: both heads start at zero, any image size is taken.
"""

from torch import Tensor, nn

from .vit import VisionTransformer


class DistilledVisionTransformer(VisionTransformer):
    """Tokens before the patches: cls, dist. With `distilling` set, training returns the logits of both heads."""

    def build(self) -> None:
        super().build()
        self.head_dist = nn.Linear(self.config.hidden_size, self.num_classes)
        self.distilling = False

    def forward_head(self, features: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(B, N, D) -> logits (B, C)

        The one exception to "a model returns logits": in training mode and with `distilling` set it returns the logits
        of the cls head and those of the dist head, (B, C) each, because the two have different targets.
        """
        cls, dist = self.head(features[:, 0]), self.head_dist(features[:, 1])
        if self.training and self.distilling:
            return cls, dist
        return (cls + dist) / 2
