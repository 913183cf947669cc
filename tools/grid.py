"""What the packaged backbone reaches untrained: its patches averaged in the fields of a grid, beside the class token. Benchmarks and trainings compare with it."""
import torch
import torch.nn.functional as F
from torch import nn

from sage.model import create_sage, evaluating


class GridModel(nn.Module):
    "A frozen backbone as it is: the mean of each field of a grid, and the class token. Describes images as a `SAGE` does."
    def __init__(self,
        backbone='sage_nano', # see `create_sage`
        fields=4,             # rows and columns of the grid
    ):
        super().__init__()
        self.backbone, self.fields = create_sage(backbone).backbone.requires_grad_(False), fields
        self.dim, self.interact = (fields**2 + 1) * self.backbone.dim, None

    @property
    def patch(self) -> int: return self.backbone.patch
    def prefix(self, images): return self.describe(images)                # nothing of it trains, so all of it comes first
    def from_prefix(self, descriptors, cross_image=False): return descriptors

    def describe(self,
        images:torch.Tensor, # normalised [N, 3, H, W]
    ) -> torch.Tensor:       # [N, dim] float32, unit length
        "Descriptors."
        with evaluating(self): cls, patches = self.backbone.suffix(self.backbone.prefix(images), power=False)
        cells = F.adaptive_avg_pool2d(patches.transpose(1, 2).unflatten(2, self.backbone.grid(images)).float(), self.fields).flatten(2)
        return torch.cat([F.normalize(cells, dim=1).flatten(1) / self.fields, F.normalize(cls.float(), dim=1)], 1) / 2**.5
