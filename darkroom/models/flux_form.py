"""What models of FLUX's form share: dual-stream blocks, and then single-stream blocks whose projections are fused.

Their texts have one fixed length, padding included, and are attended over whole: there are no masks.
"""

# B batch, T text tokens, S image tokens (a 2x2 patch of latents each), C latent channels

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from darkroom.configs.request import Request
from darkroom.parallel.plan import (
    Colwise,
    Heads,
    LocalHeads,
    LocalWidth,
    Part,
    Plan,
    Rowwise,
    SequenceParallelInput,
    SequenceParallelOutput,
)

from .autoencoder_kl import AutoencoderKLModel
from .base import Sample, noise_generator, with_context

if TYPE_CHECKING:
    import torch

_DUAL, _SINGLE = "transformer_blocks.*", "single_transformer_blocks.*"
_HEADS = Heads("num_attention_heads")
_TOKENS = SequenceParallelInput(split_dim=1, expected_dims=3, stream=True)
_POSITIONS = SequenceParallelInput(split_dim=0, expected_dims=2)


def transformer_plan(mlp_in: Colwise) -> Plan:
    """`mlp_in`: how the first layer of every MLP is cut."""
    return Plan(
        tensor={
            **{f"{block}.attn.to_{name}": Colwise(_HEADS) for block in (_DUAL, _SINGLE) for name in "qkv"},
            **{f"{_DUAL}.attn.add_{name}_proj": Colwise(_HEADS) for name in "qkv"},
            **{f"{_DUAL}.attn.{name}": Rowwise(_HEADS) for name in ("to_out.0", "to_add_out")},
            **{f"{block}.attn": LocalHeads(_HEADS, "heads") for block in (_DUAL, _SINGLE)},
            **{f"{_DUAL}.{mlp}.net.0.proj": mlp_in for mlp in ("ff", "ff_context")},
            **{f"{_DUAL}.{mlp}.net.2": Rowwise() for mlp in ("ff", "ff_context")},
            f"{_SINGLE}.proj_mlp": mlp_in,
            f"{_SINGLE}.proj_out": Rowwise(parts=(Part(heads=_HEADS), Part(width=4))),  # attention and MLP
            _SINGLE: LocalWidth("mlp_hidden_dim"),
            **{f"{_DUAL}.{norm}.linear": Colwise(gather=True) for norm in ("norm1", "norm1_context")},
            f"{_SINGLE}.norm.linear": Colwise(gather=True),  # modulation is a quarter of the weights
        },
        sequence={
            "": {
                "hidden_states": _TOKENS,
                "encoder_hidden_states": _TOKENS,
                "img_ids": _POSITIONS,
                "txt_ids": _POSITIONS,
            },
            "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3),
        },
    )


class FluxForm(AutoencoderKLModel):
    """Text to image by the stock pipelines' loop, over latents that are packed to tokens."""

    @abstractmethod
    def encode(self, prompt: str, max_sequence_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """-> hidden states [1, T, width] and their positions [T, 3]"""

    def prepare(self, request: Request) -> Sample:
        pipe = self.pipe
        texts = [self.encode(prompt, request.max_sequence_length) for prompt in self.prompts(request)]
        latents, img_ids = pipe.prepare_latents(
            1,
            pipe.transformer.config.in_channels // 4,
            request.height,
            request.width,
            texts[0][0].dtype,
            self.device,
            noise_generator(request),
        )
        return self.sample(request, texts, latents, img_ids)

    def sample(
        self,
        request: Request,
        texts: Sequence[tuple[torch.Tensor, torch.Tensor]],
        latents: torch.Tensor,
        img_ids: torch.Tensor,
        context: torch.Tensor | None = None,
    ) -> Sample:
        """`texts`: hidden states and positions by branch. `img_ids`: the latents' positions, and the context's."""
        import numpy as np

        steps = request.num_inference_steps
        return Sample(
            request=request,
            latents=latents,
            context=context,
            scheduler=self.shifted_scheduler(np.linspace(1.0, 1 / steps, steps), latents.shape[1]),
            branches=[
                {"encoder_hidden_states": embeds, "txt_ids": txt_ids, "img_ids": img_ids} for embeds, txt_ids in texts
            ],
            text_tokens=min(len(self.pipe.tokenizer(request.prompt).input_ids), request.max_sequence_length),
            image_tokens=latents.shape[1],
        )

    def predict(self, samples: Sequence[Sample], branch: int) -> torch.Tensor:
        import torch

        texts = [sample.branches[branch] for sample in samples]
        if len({(len(text["txt_ids"]), len(text["img_ids"])) for text in texts}) > 1:  # nothing could hide the padding
            return torch.cat([self.predict([sample], branch) for sample in samples])
        latents = with_context(samples)
        timestep = torch.stack([sample.timestep for sample in samples]).to(latents.dtype)
        prediction: torch.Tensor = self.pipe.transformer(
            hidden_states=latents,
            timestep=timestep / 1000,
            encoder_hidden_states=torch.cat([text["encoder_hidden_states"] for text in texts]),
            txt_ids=texts[0]["txt_ids"],
            img_ids=texts[0]["img_ids"],
            return_dict=False,
        )[0]
        return prediction[:, : samples[0].latents.shape[1]]

    def decode(self, samples: Sequence[Sample], latents: Sequence[torch.Tensor]) -> torch.Tensor | None:
        import torch

        request, pipe = samples[0].request, self.pipe
        packed = torch.cat(list(latents))
        return self.decode_latents(pipe._unpack_latents(packed, request.height, request.width, pipe.vae_scale_factor))
