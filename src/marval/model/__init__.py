"""The networks and the noise schedule: pure `nn.Module`s that know no loss, no sampler and no optimiser."""

from marval.model.diffusion import NoiseSchedule
from marval.model.head import TokenHead
from marval.model.mar import MAR

__all__ = ["MAR", "NoiseSchedule", "TokenHead"]
