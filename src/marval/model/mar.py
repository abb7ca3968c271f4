"""The MAR network (Li et al. 2024, arXiv 2406.11838): a masked transformer that gives every hidden token a context."""

import dataclasses
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from marval.config import MARConfig
from marval.model.blocks import blocks, gather_rows
from marval.model.cached import Cache, Groups, advance
from marval.model.head import ExactLinear, TokenHead


def prompt_vectors(sentences: Float[Tensor, "b e"], styles: Int[Tensor, " b"], num_styles: int) -> Float[Tensor, "b f"]:
    """Append to each sentence's embedding a 1 at the place of its style, and 0 elsewhere; style -1 is none."""
    places = torch.arange(num_styles, device=styles.device)
    return torch.cat([sentences, (styles[:, None] == places).to(sentences)], dim=1)


State = Float[Tensor, "g b d"] | Cache  # of images in the AR loop


class MAR(nn.Module):
    """Masked auto-regressive model: context network and token head, with the official parameter names.

    The encoder sees the buffer tokens (which carry the condition) and the visible tokens; the decoder sees the
    buffer, the encoded visible tokens and a mask token at every other position. All index tensors hold
    positions in the token grid, row by row.

    Where text is the condition, a small network of the prompt's embedding and style stands in the place of the table
    of classes, and `vocabulary` holds the embeddings of the prompts that the model knows.

    With `joint_draw` the mask tokens of the positions that are drawn now also carry the noise that their tokens start
    from. So the decoder knows what the others will be, and tokens of one iteration can agree.
    """

    vocabulary: Tensor

    def __init__(self, config: MARConfig):
        super().__init__()
        self.config = config
        self.checkpoint_blocks = False
        width, decoder_width = config.encoder_dim, config.decoder_dim
        places = config.buffer_size + config.num_tokens
        if config.text_dim:
            self.register_buffer("vocabulary", torch.zeros(config.num_classes, config.text_dim, dtype=torch.float16))
            inputs = config.text_dim + config.num_styles
            self.text_emb = nn.Sequential(ExactLinear(inputs, width), nn.SiLU(), ExactLinear(width, width))
        else:
            self.class_emb = nn.Embedding(config.num_classes, width)
        self.fake_latent = nn.Parameter(torch.empty(1, width))  # the null condition
        self.z_proj = nn.Linear(config.token_dim, width)
        self.z_proj_ln = nn.LayerNorm(width, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, places, width))
        self.encoder_blocks = blocks(config.encoder_depth, width, config.encoder_heads, config)
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_width))
        self.noise_proj = nn.Linear(config.token_dim, decoder_width) if config.joint_draw else None
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, places, decoder_width))
        self.decoder_blocks = blocks(config.decoder_depth, decoder_width, config.decoder_heads, config)
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=1e-6)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.empty(1, config.num_tokens, decoder_width))
        head = TokenHead(
            config.token_dim, decoder_width, config.head_width, config.head_depth, config.learn_variance,
            config.guidance_range,
        )  # fmt: skip
        self.diffloss = nn.ModuleDict({"net": head})  # its place in the official checkpoints

    @property
    def head(self) -> TokenHead:
        """The token head, the part that distillation turns into a one-step generator."""
        return self.diffloss["net"]  # type: ignore[return-value]

    def initialize(self, generator: torch.Generator) -> "MAR":
        """Draw fresh weights as the official code does: normal(0.02) embeddings, Xavier linear layers."""
        embeddings = [
            *([] if self.config.text_dim else [self.class_emb.weight]),
            self.fake_latent,
            self.mask_token,
            self.encoder_pos_embed_learned,
            self.decoder_pos_embed_learned,
            self.diffusion_pos_embed_learned,
        ]
        for embedding in embeddings:
            nn.init.normal_(embedding, std=0.02, generator=generator)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        self.head.initialize(generator)
        return self

    def draw_jointly(self, generator: torch.Generator) -> "MAR":
        """Let mask tokens read noise, by a layer that starts as MAR's others do, times 0.3; return the network.

        Larger weights would spoil the contexts that the network gives. From zeros, tokens would stay independent for
        long: little tells the layers behind to look at the noise.
        """
        self.config = dataclasses.replace(self.config, joint_draw=True)
        layer = nn.Linear(self.config.token_dim, self.config.decoder_dim)
        nn.init.xavier_uniform_(layer.weight, 0.3, generator)
        nn.init.zeros_(layer.bias)
        self.noise_proj = layer.to(self.mask_token)
        return self

    def known_prompts(self, labels: Int[Tensor, " b"]) -> Float[Tensor, "b f"]:
        """The vectors of prompts that the model knows; a label counts the styles of the first, of the second, ..."""
        each = self.config.labels_per_class
        sentences = self.vocabulary[labels // each].to(self.fake_latent.dtype)
        return prompt_vectors(sentences, labels % each, self.config.num_styles)

    def embed(
        self, given: Int[Tensor, " b"] | Float[Tensor, "b f"], drop: Float[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b d"]:
        """Embed classes as conditions; the null condition where `drop` is 1 (label drop, in training).

        Args:
            given: labels or, where text is the condition, labels of known prompts or the vectors of any prompts (see
                `prompt_vectors`).
        """
        if self.config.text_dim:
            vectors = given if given.is_floating_point() else self.known_prompts(given)
            # A sentence's vector has length 1: so its numbers get a variance of about 1, as other layers' inputs.
            condition = self.text_emb(vectors * self.config.text_dim**0.5).to(self.fake_latent.dtype)
        else:
            condition = self.class_emb(given)
        return condition if drop is None else torch.lerp(condition, self.fake_latent, drop[:, None])

    def null_condition(self, batch: int) -> Float[Tensor, "b d"]:
        """The condition without a class or prompt, for each image of a batch."""
        return self.fake_latent.repeat(batch, 1)  # no view: sharded weights are freed after the call

    def encode(
        self,
        tokens: Float[Tensor, "b l c"],
        visible: Int[Tensor, "b v"],
        condition: Float[Tensor, "b d"],
    ) -> Float[Tensor, "b n d"]:
        """Encode the buffer and the visible tokens; hidden tokens are neither read nor computed."""
        x = self.embed_tokens(tokens, visible, condition)
        for block in self.encoder_blocks:
            x = self.run(block, x)
        return self.encoder_norm(x)

    def embed_tokens(
        self,
        tokens: Float[Tensor, "b l c"],
        visible: Int[Tensor, "b v"],
        condition: Float[Tensor, "b d"] | None,
    ) -> Float[Tensor, "b n d"]:
        """Embed the buffer (not where there is no condition), then the visible tokens: the encoder's input."""
        buffer = self.config.buffer_size
        places = self.encoder_pos_embed_learned.expand(tokens.shape[0], -1, -1)
        given = gather_rows(tokens, visible).to(self.z_proj.weight.dtype)  # tokens are float32 whatever the weights are
        x = self.z_proj(given) + gather_rows(places[:, buffer:], visible)
        if condition is not None:
            x = torch.cat([condition[:, None] + places[:, :buffer], x], dim=1)
        return self.z_proj_ln(x)

    def decode(
        self,
        encoded: Float[Tensor, "b n d"],
        visible: Int[Tensor, "b v"],
        positions: Int[Tensor, "b q"],
        noise: Float[Tensor, "b q c"] | None = None,
    ) -> Float[Tensor, "b q e"]:
        """The context of the tokens at `positions`; the last block is computed there and nowhere else."""
        buffer, batch = self.config.buffer_size, encoded.shape[0]
        x = self.decoder_embed(encoded)
        hidden = self.mask_token.to(x.dtype).expand(batch, self.config.num_tokens, -1)
        if self.noise_proj is not None:
            drawn = self.mask_tokens(x, positions.shape[1], noise)
            hidden = hidden.scatter(1, positions[..., None].expand_as(drawn), drawn)
        index = visible[..., None].expand(-1, -1, x.shape[-1])
        x = torch.cat([x[:, :buffer], hidden.scatter(1, index, x[:, buffer:])], dim=1) + self.decoder_pos_embed_learned
        *blocks, last = self.decoder_blocks
        for block in blocks:
            x = self.run(block, x)
        x = self.decoder_norm(self.run(last, x, gather_rows(x, positions + buffer)))
        return x + gather_rows(self.diffusion_pos_embed_learned.expand(batch, -1, -1), positions)

    def mask_tokens(
        self, x: Float[Tensor, "b n d"], count: int, noise: Float[Tensor, "b q c"] | None
    ) -> Float[Tensor, "b q d"]:
        """Mask tokens of what is drawn now, in the form of `x`: in a joint draw they carry what tokens start from.

        Raises:
            ValueError: no noise for a joint draw.
        """
        tokens = self.mask_token.to(x.dtype).expand(x.shape[0], count, -1)
        if self.noise_proj is None:
            return tokens
        if noise is None:
            raise ValueError("this network draws tokens jointly: expected the noise that they start from")
        return tokens + self.noise_proj(noise.to(self.noise_proj.weight.dtype)).to(x.dtype)

    def run(self, block: nn.Module, *inputs: Any) -> Any:
        """A block; with `checkpoint_blocks` its activations are computed again in the backward pass, not kept."""
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=self.training)
        return block(*inputs)

    def context(
        self,
        tokens: Float[Tensor, "b l c"],
        visible: Int[Tensor, "b v"],
        positions: Int[Tensor, "b q"],
        condition: Float[Tensor, "b d"],
        noise: Float[Tensor, "b q c"] | None = None,
    ) -> Float[Tensor, "b q e"]:
        """The context vector `c` of every token at `positions`, given the tokens at `visible`.

        Args:
            noise: what these tokens start from, of a network that draws them jointly; others do not read it.
        """
        return self.decode(self.encode(tokens, visible, condition), visible, positions, noise)

    def start(self, *conditions: Float[Tensor, "b d"]) -> State:
        """The state of images without tokens, under each condition: one, or the condition and the null condition."""
        return Cache(torch.stack(conditions)) if self.config.cached else torch.stack(conditions)

    def advance(
        self,
        state: State,
        tokens: Float[Tensor, "b l c"],
        visible: Int[Tensor, "b v"],
        positions: Int[Tensor, "b q"],
        groups: Groups | None = None,
        noise: Float[Tensor, "b q c"] | None = None,
    ) -> tuple[Float[Tensor, "g n e"], State]:
        """The contexts at `positions` under each condition, flattened over the batch, and the next state.

        `visible` grows at its end from call to call, so that a network with a cache (`config.cached`) reads what is
        new and no more. Others remember the conditions and compute everything again, all conditions in one pass.

        Args:
            groups: what was drawn together, where that is not all that is new and all of `positions`; read by a network
                with a cache only, as the others see sets.
            noise: see `context`.
        """
        conditions = state.conditions if isinstance(state, Cache) else state
        copies = conditions.shape[0]  # `len` would be a fixed number in an ONNX graph
        tokens, visible, positions = (torch.cat([x] * copies) for x in (tokens, visible, positions))
        noise = None if noise is None else torch.cat([noise] * copies)
        if isinstance(state, Cache):
            context, state = advance(self, state, tokens, visible, positions, groups, noise)
        else:
            context = self.context(tokens, visible, positions, conditions.flatten(0, 1), noise)
        return context.unflatten(0, (copies, -1)).flatten(1, 2), state
