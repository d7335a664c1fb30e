"""How many ranks share the work, axis by axis. Plain numbers: no torch, no process group."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


def _degree(short: str, description: str) -> int:
    field: int = Field(1, ge=1, validation_alias=short, description=description)
    return field


class ParallelConfig(BaseModel):
    """The degrees of parallelism. The product of the first four is the number of workers (the DiT group)."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    cfg_parallel_size: int = _degree("cfg", "ranks that share the branches of classifier-free guidance")
    ring_degree: int = _degree("ring", "ranks of ring attention (keys and values travel)")
    ulysses_degree: int = _degree("usp", "ranks of Ulysses attention (heads are exchanged)")
    tensor_parallel_size: int = _degree("tp", "ranks that share every layer's weights")
    vae_patch_parallel_size: int = _degree("vae-pp", "ranks that decode one picture; at most the DiT group")
    vae_use_tiling: bool = Field(False, description="decode in overlapping tiles: less memory, blended seams")

    @property
    def axes(self) -> dict[str, int]:
        """Degree by axis name, outermost first: the order in which ranks are laid out."""
        return {
            "cfg": self.cfg_parallel_size,
            "ring": self.ring_degree,
            "ulysses": self.ulysses_degree,
            "tp": self.tensor_parallel_size,
        }

    @property
    def sequence_parallel_size(self) -> int:
        return self.ring_degree * self.ulysses_degree

    @property
    def world_size(self) -> int:
        return self.cfg_parallel_size * self.sequence_parallel_size * self.tensor_parallel_size

    @property
    def vae_size(self) -> int:
        """How many ranks decode: `vae_patch_parallel_size`, cut to the DiT group."""
        return min(self.vae_patch_parallel_size, self.world_size)
