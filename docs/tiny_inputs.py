"""Inputs of models of Hugging Face transformers, by the names of what their forward passes take."""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tiny_configs import ORDINARY, VOCABULARY, get, parts, text_of


class Maker:
    """Makes inputs of a model, by the names of its arguments."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        self.names = inspect.signature(model.forward).parameters
        self.text = text_of(self.config)

    def find(self, names: tuple[str, ...], default: Any = None, kind: str = "") -> Any:
        """The first of these entries, in the part of a configuration of this kind or else in any."""
        for wanted in (kind, ""):
            for part, config in parts(self.config):
                if re.search(wanted, part) and (found := [get(config, n) for n in names]):
                    value = next((each for each in found if each is not None), None)
                    if value is not None:
                        return value
        return default

    # -- text --

    def tokens(self, length: int = 8) -> torch.Tensor:
        vocabulary = min(self.find(("vocab_size",), VOCABULARY, "text"), self.text_vocabulary())
        return torch.randint(min(ORDINARY, vocabulary // 2), vocabulary, (1, length))

    def texts(self) -> Iterator[torch.Tensor]:
        yield self.tokens()
        if books := self.find(("num_codebooks",), 0):
            yield self.tokens().unsqueeze(-1).expand(1, 8, books + 1).clone()

    def outputs(self) -> Iterator[torch.Tensor]:
        yield self.tokens(6)
        if channels := self.find(("num_channels", "num_codebooks"), 0, "decoder"):
            yield self.tokens(6).unsqueeze(-1).expand(1, 6, channels).clone()

    def text_vocabulary(self) -> int:
        return getattr(self.text, "vocab_size", None) or VOCABULARY

    def width(self, kind: str = "") -> int:
        return self.find(("hidden_size", "d_model", "n_embd", "dim"), 32, kind)

    # -- images --

    def image_size(self) -> tuple[int, int]:
        size: Any = self.find(("image_size", "img_size", "input_size"), 64, "vision|image|backbone|encoder")
        if isinstance(size, dict):
            size = (size.get("height", size.get("longest_edge")), size.get("width", size.get("longest_edge")))
        return (size, size) if isinstance(size, int) else (size[-2], size[-1])

    def channels(self) -> int:
        return self.find(("num_channels", "in_channels", "in_chans"), 3, "vision|image|backbone|encoder")

    def patch(self) -> int:
        patch = self.find(("patch_size",), 16, "vision|image")
        return patch if isinstance(patch, int) else patch[-1]

    def grid(self) -> int:
        merge = self.find(("spatial_merge_size", "merge_size", "merge_kernel_size", "downsample_factor"), 1, "vision")
        return 2 * max(2, merge if isinstance(merge, int) else merge[0])

    def images(self) -> Iterator[torch.Tensor]:
        count, side = self.grid() ** 2, self.patch()
        flat = self.channels() * side * side
        frames = self.find(("temporal_patch_size", "patch_temporal", "temporal_patch"), 1, "vision")
        height, width = self.image_size()
        whole = torch.randn(1, self.channels(), height, width)
        if any(name in self.names for name in PATCHED):
            yield torch.randn(count, flat * frames)
            yield torch.randn(count, flat * (3 - frames))
            yield torch.randn(1, count, flat)
            yield torch.randn(count, self.channels(), side, side)
            return
        if "target_sizes" in self.names:
            yield torch.randn(1, self.channels(), side, count * side)
        number = self.find(("num_frames", "frames_per_clip"), 0)
        if number:
            yield whole.unsqueeze(1).expand(-1, number, -1, -1, -1).clone()
        yield whole
        yield whole.unsqueeze(1)  # images of each text
        for tiles in (2, 3, 5):  # pairs, or an image and its parts
            yield whole.unsqueeze(1).expand(-1, tiles, -1, -1, -1).clone()
        for size in (64, 128, 224, 256):
            yield torch.randn(1, self.channels(), size, size)

    def videos(self) -> Iterator[torch.Tensor]:
        if "video_grid_thw" in self.names:
            yield from self.images()
            return
        number = self.find(("num_frames", "frames_per_clip"), 2)
        yield torch.randn(1, number, self.channels(), *self.image_size())

    def grids(self) -> Iterator[torch.Tensor]:
        yield torch.tensor([[1, self.grid(), self.grid()]])

    def places(self) -> torch.Tensor:
        side = torch.arange(self.grid())
        return torch.cartesian_prod(side, side).unsqueeze(0)

    # -- sound --

    def features(self) -> Iterator[torch.Tensor]:
        found = [self.find((name,), None, "audio|encoder|speech") for name in BINS]
        stacked = self.find(("num_stacked_frames", "stacking_factor"), 1)
        bins = dict.fromkeys(size * factor for factor in (1, stacked, 4) for size in found if isinstance(size, int))
        for length in self.lengths():
            for size in bins or (80,):
                yield torch.randn(1, size, length)
                yield torch.randn(1, length, size)

    def lengths(self) -> list[int]:
        """Return the lengths of sound to try, in frames."""
        return list(dict.fromkeys((2 * self.find(("max_source_positions",), 64, "audio|encoder|speech"), 128, 200)))

    def sound(self) -> Iterator[torch.Tensor]:
        bins, longest = self.find(("num_mel_bins",)), self.find(("max_length",))
        if bins and longest:
            yield torch.randn(1, longest, bins)
        for length in (3840, 15360, 48000):
            yield torch.randn(1, length)
            yield torch.randn(1, 1, length)
        yield torch.randn(1, 8, self.width())

    # -- all --

    def candidates(self, name: str) -> list[Any]:
        """Return values that an argument may take; an empty list if the argument is not known."""
        made = RULES.get(name)
        if made is None:
            return []
        found = made(self)
        return [found] if isinstance(found, torch.Tensor | int) else list(found)

    def inputs(self) -> Iterator[dict[str, Any]]:
        """Inputs, those first that give the model all that it takes."""
        main = self.model.main_input_name
        variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        needed = [n for n, p in self.names.items() if p.default is p.empty and p.kind not in variadic]
        for name in [main] if isinstance(main, str) else main:
            if name in self.names and name not in needed and not any(n in needed for n in SAME.get(name, ())):
                needed.append(name)
        if getattr(self.config, "is_encoder_decoder", False):
            needed += [n for n in ("decoder_input_ids",) if n in self.names]
        optional = [n for n in OPTIONAL if n in self.names and n not in needed]
        video = [n for n in optional if "video" in n]
        sound = [n for n in optional if n.startswith(("input_features", "input_values", "feature_", "audio"))]
        image = [n for n in optional if n not in video and n not in sound]
        seen: list[list[str]] = []
        for chosen in (image + video + sound, image + sound, image, sound, video, []):
            for names in ([*needed, *chosen], [*needed, *(n for n in chosen if n not in EXTRAS)]):
                if names in seen:
                    continue
                seen.append(names)
                lists = [(name, self.candidates(name)) for name in names]
                if missing := [n for n, each in lists if not each and n in needed and n not in MASKS]:
                    raise ValueError(f"no rule for its input {', '.join(missing)}")
                for values in itertools.islice(itertools.product(*(each for _, each in lists if each)), 24):
                    yield self.completed(dict(zip((name for name, each in lists if each), values, strict=True)), names)

    def completed(self, inputs: dict[str, Any], names: list[str]) -> dict[str, Any]:
        """The same, with masks of features, and with a placeholder in the text for each part of an image or sound."""
        for name, of in MASKS.items():
            if name in names and of in inputs:
                sizes = inputs[of].shape[1:]
                length = next((size for size in sizes if size in self.lengths()), max(sizes))
                inputs[name] = torch.ones(1, length, dtype=torch.long)
        ids = inputs.get("input_ids")
        if ids is None or ids.ndim > 2:
            return inputs
        kinds = torch.zeros_like(ids)
        for number, kind in enumerate(("image", "video", "audio"), 1):
            method = getattr(self.model, f"get_{kind}_features", None)
            token = self.find((f"{kind}_token_id", f"{kind}_token_index"))
            if method is None or token is None:
                continue
            try:
                taken = inspect.signature(method).parameters
                count = _count(method(**{n: v for n, v in inputs.items() if n in taken and n != "input_ids"}))
            except Exception:
                continue
            ids = torch.cat([ids[:, :1], torch.full((1, count), token), ids[:, 1:]], 1)
            kinds = torch.cat([kinds[:, :1], torch.full((1, count), number), kinds[:, 1:]], 1)
        inputs["input_ids"] = ids
        if "mm_token_type_ids" in self.names:
            inputs["mm_token_type_ids"] = kinds
        return inputs


def _count(found: Any) -> int:
    """The number of embeddings that a part of an image or sound has become."""
    found = getattr(found, "pooler_output", found)
    if isinstance(found, list | tuple):
        return sum(_count(each) for each in found)
    return math.prod(found.shape[:-1])


# Names for the same thing.
SAME = {"input_ids": ("hidden_states", "pixel_values", "query_embeds"), "pixel_values": ("hidden_states",),
        "input_values": ("hidden_states",)}  # fmt: skip

# Arguments that are given although the signature does not require them.
OPTIONAL = (
    "input_ids", "pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "input_features",
    "input_values", "bbox", "visual_feats", "visual_pos", "lang_ids", "decoder_input_values", "decoder_input_ids",
    "future_values", "future_time_features", "actions", "rewards", "returns_to_go", "timesteps",
    "encoder_hidden_states", "spatial_shapes", "pixel_attention_mask", "target_sizes", "image_sizes",
    "image_position_ids", "input_features_mask", "feature_attention_mask", "image_attention_mask",
    "image_embeds_position_mask",
)  # fmt: skip

# Models that take one of these take patches of images.
PATCHED = ("grid_thw", "image_grid_thw", "pixel_position_ids", "image_position_ids", "spatial_shapes")

# Names in configurations for the number of features of a frame of sound.
BINS = (
    "num_mel_bins", "n_mels", "mel_bins", "feature_size", "input_feat_per_channel", "model_in_channels",
    "feature_projection_input_dim", "input_dim", "input_feat_size", "audio_input_feat_size",
)  # fmt: skip

# Arguments that many models take, and few need.
EXTRAS = (
    "image_sizes", "encoder_hidden_states", "target_sizes", "pixel_attention_mask", "input_features_mask",
    "image_attention_mask", "image_embeds_position_mask",
)  # fmt: skip

MASKS = {
    "input_features_mask": "input_features",
    "feature_attention_mask": "input_features",
    "audio_mel_mask": "audio_mel",
    "padding_mask": "input_values",
    "pixel_attention_mask": "pixel_values",
}


def _past(maker: Maker, width: int | None = None) -> torch.Tensor:
    """A series as long as a model of series reads, of numbers or of vectors."""
    length = maker.find(("context_length",), 8) + max(maker.find(("lags_sequence",), [0]))
    return torch.randn(1, length) if width is None else torch.randn(1, length, width)


def _series(maker: Maker) -> Iterator[torch.Tensor]:
    yield _past(maker)
    yield _past(maker, maker.find(("num_input_channels",), 1))


RULES: dict[str, Callable[[Maker], Any]] = {
    "input_ids": Maker.texts,
    "decoder_input_ids": Maker.outputs,
    "qformer_input_ids": lambda m: m.tokens(),
    "pixel_values": Maker.images,
    "pixel_values_videos": Maker.videos,
    "hidden_states": Maker.images,
    "grid_thw": Maker.grids,
    "image_grid_thw": Maker.grids,
    "video_grid_thw": Maker.grids,
    "input_features": Maker.features,
    "audio_mel": Maker.features,
    "input_values": Maker.sound,
    "bbox": lambda m: torch.tensor([1, 2, 3, 4]).expand(1, 8, 4).clone(),
    "visual_feats": lambda m: torch.randn(1, 5, m.find(("visual_feat_dim",), 32)),
    "visual_pos": lambda m: torch.rand(1, 5, 4),
    "lang_ids": lambda m: torch.zeros(1, dtype=torch.long),
    "query_embeds": lambda m: torch.randn(1, 4, m.width()),
    "encoder_hidden_states": lambda m: torch.randn(1, 5, m.find(("encoder_hidden_size",), m.width())),
    "spatial_shapes": lambda m: torch.tensor([[m.grid(), m.grid()]]),
    "target_sizes": lambda m: torch.tensor([[m.grid(), m.grid()]]),
    "image_sizes": lambda m: torch.tensor([m.image_size()]),
    "image_attention_mask": lambda m: torch.ones(1, 8, 1, dtype=torch.long),
    "image_embeds_position_mask": lambda m: (torch.arange(8) < m.find(("latent_query_num",), 4)).unsqueeze(0),
    "pixel_position_ids": Maker.places,
    "image_position_ids": Maker.places,
    "past_values": _series,
    "past_observed_mask": lambda m: torch.ones_like(_past(m)),
    "past_time_features": lambda m: _past(m, m.find(("num_time_features",), 1)),
    "past_values_padding": lambda m: torch.zeros_like(_past(m)).long(),
    "freq": lambda m: torch.zeros(1, 1, dtype=torch.long),
    "future_values": lambda m: torch.randn(1, m.find(("prediction_length",), 4)),
    "future_time_features": lambda m: torch.randn(
        1, m.find(("prediction_length",), 4), m.find(("num_time_features",), 1)
    ),
    "states": lambda m: torch.randn(1, 4, m.find(("state_dim",), 4)),
    "actions": lambda m: torch.randn(1, 4, m.find(("act_dim",), 4)),
    "rewards": lambda m: torch.randn(1, 4, 1),
    "returns_to_go": lambda m: torch.randn(1, 4, 1),
    "timesteps": lambda m: torch.arange(4).unsqueeze(0),
    "inputs_embeds": lambda m: torch.randn(1, 8, m.width()),
    "noise_embeds": lambda m: torch.randn(1, 4, m.width()),
    "context_hidden_states": lambda m: [torch.randn(1, 8, m.width() * layers) for layers in range(1, 9)],
    "latents": lambda m: torch.randn(1, m.width(), 8),
    "inputs": lambda m: torch.randn(1, 8, m.find(("d_model",), 32)),
    "prompt_pixel_values": Maker.images,
    "prompt_masks": Maker.images,
    "task_inputs": lambda m: m.tokens(m.find(("task_seq_len",), 8)),
    "merge_sizes": lambda m: torch.tensor([1]),
}
