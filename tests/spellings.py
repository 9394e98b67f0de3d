"""How LoRA files are spelled: every mix of prefix, suffix, module names and scale that tools write, as small files.

The models are Qwen-Image (two blocks) and Z-Image (two layers and one block of each refiner) at small widths or at
full ones. Everything here is written out by hand, not taken from `converters`, so that tests can hold `converters`
against it. `spellings` lists the files, `Spelling.tensors` and `Spelling.metadata` make one, `Spelling.updates` says
what it means.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import safetensors.torch
import torch

RANK = 4
QWEN, Z = "qwen-image", "z-image"

PREFIXES = {
    "diffusion_model.": True,
    "transformer.": True,
    "": True,
    "lycoris_": False,
    "lora_unet_": False,
    "lora_unet__": False,
    "base_model.model.": True,
    "transformer.base_model.model.": True,
    "model.diffusion_model.": True,
    "lora_transformer_": False,
    "transformer._orig_mod.": True,
    "_orig_mod.": True,
    "pipe.dit.": True,
    "unet.": True,
}
"""What stands before the module's name, and whether that name keeps its dots."""

SUFFIXES = {
    "A/B": (".lora_A.weight", ".lora_B.weight"),
    "A/B default": (".lora_A.default.weight", ".lora_B.default.weight"),
    "A/B style": (".lora_A.style.weight", ".lora_B.style.weight"),
    "down/up": (".lora_down.weight", ".lora_up.weight"),
    "lora.down": (".lora.down.weight", ".lora.up.weight"),
    "A/B bare": (".lora_A", ".lora_B"),
    "linear_layer": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "_lora.down": ("_lora.down.weight", "_lora.up.weight"),
}
"""What stands behind the module's name, for the down and the up factor."""

NAMES = ("ours", "native", "both", "singles", "dotted refiners", "no up", "no down", "alpha alone")
"""``ours``: diffusers' names. ``native``: fused q, k and v. ``both``: the fused layers beside q, k and v of the same
update. ``singles``: the layers outside the blocks. ``dotted refiners``: ``context.refiner.0``. ``no up``, ``no down``:
the first module lacks that factor. ``alpha alone``: one more ``.alpha``, of a module without factors."""

SCALES = ("none", "rank", "half", "negative", "header", "rslora", "pattern", "stale")
"""``none``: nothing says a scale. ``rank``, ``half``, ``negative``: an ``.alpha`` beside the factors, of the rank, half
of it, or minus it. In the header, as diffusers and SimpleTuner write it: ``header``: alpha is twice the rank;
``rslora``: the same divided by the root of the rank; ``pattern``: to_q has an alpha and to_k a rank of its own;
``stale``: a rank and an alpha that are not the file's (whoever changed the rank kept the header)."""

_WIDTH, _QWEN_TEXT, _Z_TEXT, _Z_MLP = 16, 8, 8, 42


@dataclass(frozen=True)
class Model:
    """``blocks`` by path, ``kinds`` by name: (in, out) in units of the width, or absolute where there is no width.
    ``fused``: native name by the kinds it stacks; ``renamed``: native name by ours."""

    blocks: tuple[str, ...]
    kinds: dict[str, tuple[int, int]]
    singles: dict[str, tuple[int, int]]
    fused: dict[str, tuple[str, ...]]
    renamed: dict[str, str]

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """Every linear layer of the blocks: path to (in, out)."""
        return {
            f"{block}.{kind}": size
            for block in self.blocks
            for kind, size in self.kinds.items()
            if not (block.startswith("context_refiner") and kind.startswith("adaLN"))
        }


def model(family: str, full: bool = False) -> Model:
    """The layers of a model at small widths or at full ones."""
    if family == QWEN:
        h, latent, text = (3072, 64, 3584) if full else (_WIDTH, 4, _QWEN_TEXT)
        attention = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        kinds = {f"attn.{name}": (h, h) for name in attention}
        for side in ("img", "txt"):
            kinds |= {
                f"{side}_mlp.net.0.proj": (h, 4 * h),
                f"{side}_mlp.net.2": (4 * h, h),
                f"{side}_mod.1": (h, 6 * h),
            }
        singles = {
            "img_in": (latent, h),
            "txt_in": (text, h),
            "time_text_embed.timestep_embedder.linear_1": (256, h),
            "time_text_embed.timestep_embedder.linear_2": (h, h),
            "norm_out.linear": (h, 2 * h),
            "proj_out": (h, latent),
        }
        fused = {
            "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "attn.add_qkv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        }
        return Model(("transformer_blocks.0", "transformer_blocks.1"), kinds, singles, fused, {})
    h, mlp, latent, text, adaln = (3840, 10240, 64, 2560, 256) if full else (_WIDTH, _Z_MLP, 8, _Z_TEXT, _WIDTH)
    kinds = {f"attention.{name}": (h, h) for name in ("to_q", "to_k", "to_v", "to_out.0")}
    kinds |= {f"feed_forward.w{n}": (mlp, h) if n == 2 else (h, mlp) for n in (1, 2, 3)}
    kinds |= {"adaLN_modulation.0": (adaln, 4 * h)}
    singles = {
        "all_x_embedder.2-1": (latent, h),
        "all_final_layer.2-1.linear": (h, latent),
        "all_final_layer.2-1.adaLN_modulation.1": (adaln, h),
        "t_embedder.mlp.0": (256, 1024),
        "t_embedder.mlp.2": (1024, adaln),
        "cap_embedder.1": (text, h),
    }
    renamed = {
        "attention.to_out.0": "attention.out",
        "all_x_embedder.2-1": "x_embedder",
        "all_final_layer.2-1.linear": "final_layer.linear",
        "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
    }
    fused = {"attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v")}
    return Model(("layers.0", "layers.1", "context_refiner.0", "noise_refiner.0"), kinds, singles, fused, renamed)


@cache
def _noise(name: str, rows: int, columns: int) -> torch.Tensor:
    """The same numbers for the same name on every machine: float32 [rows, columns], about 1 in size."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Layer:
    """A layer as a file holds it: the modules whose rows it stacks; its factors, down [rank, in], up [out, rank]."""

    name: str
    paths: tuple[str, ...]
    down: torch.Tensor
    up: torch.Tensor


@dataclass(frozen=True)
class Spelling:
    """One way to write a LoRA. See PREFIXES, SUFFIXES, NAMES and SCALES."""

    family: str
    prefix: str
    suffix: str
    names: str = "ours"
    scale: str = "none"

    @property
    def id(self) -> str:
        return f"{self.family}|{self.prefix}|{self.suffix}|{self.names}|{self.scale}"

    @staticmethod
    def of(id: str) -> Spelling:
        return Spelling(*id.split("|"))

    def rank(self, path: str) -> int:
        return RANK // 2 if self.scale == "pattern" and path.endswith("to_k") else RANK

    def layers(self, full: bool = False) -> Iterator[Layer]:
        """What is in the file, in the model's order. q, k and v of a fused layer share their down factor, always: so
        the updates are the same in every spelling."""
        sizes = model(self.family, full)
        group = {path: fused for fused, paths in sizes.fused.items() for path in paths}
        modules = sizes.singles if self.names == "singles" else sizes.modules
        factors = {}
        for path, (d_in, d_out) in modules.items():
            kind = next((kind for kind in sizes.kinds if path.endswith(f".{kind}")), path)
            stem = path.removesuffix(kind) + group.get(kind, kind)
            rank = self.rank(path)
            factors[path] = (_noise(f"{stem} down", rank, d_in), _noise(f"{path} up", d_out, rank))
        native = self.names in ("native", "both")
        done = set()
        for path, (down, up) in factors.items():
            kind = next((kind for kind in sizes.kinds if path.endswith(f".{kind}")), path)
            fused = group.get(kind)
            if native and fused:
                stem = path.removesuffix(kind)
                if stem + fused not in done:
                    done.add(stem + fused)
                    paths = tuple(stem + other for other in sizes.fused[fused])
                    yield Layer(stem + fused, paths, down, torch.cat([factors[other][1] for other in paths]))
                if self.names == "native":
                    continue
            name = path
            if native and kind in sizes.renamed:
                name = path.removesuffix(kind) + sizes.renamed[kind]
                if self.names == "both":
                    yield Layer(name, (path,), down, up)
                    name = path
            yield Layer(name, (path,), down, up)

    def tensors(self, full: bool = False) -> dict[str, torch.Tensor]:
        """The state dict, float32."""
        made, (down_key, up_key) = {}, SUFFIXES[self.suffix]
        alpha = {"rank": RANK, "half": RANK / 2, "negative": -RANK}.get(self.scale)
        for layer in self.layers(full):
            stem = self._stem(layer.name)
            made[stem + down_key], made[stem + up_key] = layer.down.clone(), layer.up.clone()
            if alpha is not None:
                made[stem + ".alpha"] = torch.tensor(float(alpha))
        if self.names in ("no up", "no down"):
            made.pop(self._stem(next(self.layers(full)).name) + (up_key if self.names == "no up" else down_key))
        if self.names == "alpha alone":
            made[self._stem(next(iter(model(self.family).singles))) + ".alpha"] = torch.tensor(float(RANK))
        return made

    def _stem(self, name: str) -> str:
        if self.names == "dotted refiners":
            name = name.replace("_refiner.", ".refiner.")
        return self.prefix + (name if PREFIXES[self.prefix] else name.replace(".", "_"))

    def config(self) -> dict[str, object]:
        """The LoRA's configuration in PEFT's words, as its ``adapter_config.json`` has it: what the header says where
        it does, else an alpha that is the rank."""
        config: dict[str, object] = {"r": RANK, "lora_alpha": RANK, "use_rslora": self.scale == "rslora"}
        if self.scale in ("header", "rslora", "pattern"):
            config["lora_alpha"] = 2 * RANK
        if self.scale == "pattern":
            paths = [path for layer in self.layers() for path in layer.paths]
            config["alpha_pattern"] = {path: 4 * RANK for path in paths if path.endswith("to_q")}
            config["rank_pattern"] = {path: RANK // 2 for path in paths if path.endswith("to_k")}
        if self.scale == "stale":
            config |= {"r": 2 * RANK, "lora_alpha": 2 * RANK}
        return config

    def metadata(self) -> dict[str, str]:
        """The file's header: diffusers' ``lora_adapter_metadata`` where the scale is told there."""
        if self.scale not in ("header", "rslora", "pattern", "stale"):
            return {"format": "pt"}
        told = {"peft_type": "LORA", "bias": "none", "target_modules": self.targets(), **self.config()}
        text = json.dumps({f"transformer.{key}": value for key, value in told.items()}, indent=2, sort_keys=True)
        return {"format": "pt", "lora_adapter_metadata": text}

    def targets(self) -> list[str]:
        """The modules by our names."""
        return sorted({path for layer in self.layers() for path in layer.paths})

    def scales(self) -> dict[str, float]:
        """What the update of each module is truly multiplied with, by path."""
        found = {}
        for path in self.targets():
            scale = {"half": 0.5, "negative": -1.0, "header": 2.0, "rslora": 2 * RANK**0.5}.get(self.scale, 1.0)
            if self.scale == "pattern":
                scale = 4.0 if path.endswith("to_q") else 2 * RANK / self.rank(path)
            found[path] = scale
        return found

    def updates(self, full: bool = False) -> dict[str, torch.Tensor]:
        """What the file means: the update of each module's weight by path, float32 [out, in]. A module of which a
        factor is missing has none."""
        scales, found = self.scales(), {}
        for layer in self.layers(full):
            for path, up in zip(layer.paths, layer.up.chunk(len(layer.paths)), strict=True):
                found[path] = scales[path] * up @ layer.down
        if self.names in ("no up", "no down"):
            found.pop(next(self.layers(full)).name)
        return found

    def save(self, path: Path, full: bool = False) -> Path:
        safetensors.torch.save_file(self.tensors(full), path, self.metadata())
        return path

    def save_header(self, path: Path) -> Path:
        """The same at full widths, but the factors are zeros that take no room on the disk."""
        header, end, numbers = {"__metadata__": self.metadata()}, 0, b""
        for key, tensor in sorted(self.tensors(full=True).items(), key=lambda item: item[1].ndim):  # alphas first
            numbers += tensor.numpy().tobytes() if tensor.ndim == 0 else b""
            header[key] = {"dtype": "F32", "shape": [*tensor.shape], "data_offsets": [end, end + tensor.nbytes]}
            end += tensor.nbytes
        text = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text + numbers)
            file.truncate(8 + len(text) + end)
        return path


ALPHAS = ("none", "rank", "half")
HEADERS = ("header", "rslora", "pattern", "stale")

_CROSSED = (
    # prefixes, suffixes, names, scales
    (("diffusion_model.", "transformer.", ""), tuple(SUFFIXES), ("ours", "native"), ALPHAS),
    (("lycoris_", "lora_unet_", "lora_unet__", "lora_transformer_"), ("down/up", "A/B"), ("ours", "native"), ALPHAS),
    (
        ("base_model.model.", "transformer.base_model.model.", "model.diffusion_model."),
        ("A/B", "A/B default", "down/up", "lora.down"),
        ("ours",),
        ALPHAS,
    ),
    (("transformer._orig_mod.", "_orig_mod."), ("A/B", "down/up", "lora.down"), ("ours",), ALPHAS),
    (("pipe.dit.", "unet."), ("A/B", "A/B default", "down/up"), ("ours",), ("none",)),
    (("transformer.",), ("A/B", "lora.down", "down/up"), ("ours",), HEADERS),
    (("diffusion_model.", "", "base_model.model.", "transformer._orig_mod."), ("A/B",), ("ours",), HEADERS),
    (
        ("diffusion_model.", "transformer.", ""),
        ("A/B", "down/up"),
        ("singles", "no up", "no down", "alpha alone"),
        ("none",),
    ),
    (("lora_unet_",), ("down/up",), ("singles", "no up", "no down", "alpha alone"), ("none", "rank")),
    (("diffusion_model.", "transformer.", ""), ("A/B", "down/up", "lora.down"), ("both",), ("none", "half")),
    (("lora_unet_",), ("down/up",), ("both",), ALPHAS),
    (("diffusion_model.", ""), ("A/B", "down/up"), ("ours",), ("negative",)),
    (("lora_unet_",), ("down/up",), ("ours", "native"), ("negative",)),
)


def spellings() -> list[Spelling]:
    """Every spelling that some tool writes, and those that are one step beside."""
    found = [Spelling(family, *parts) for family in (QWEN, Z) for crossed in _CROSSED for parts in product(*crossed)]
    found += [Spelling(Z, "diffusion_model.", suffix, "dotted refiners") for suffix in ("A/B", "down/up")]
    return list(dict.fromkeys(found))
