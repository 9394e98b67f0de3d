"""Style's heads: embeddings of several pictures to one LoRA, ours beside the authors' decoder and merge.

    python benchmarks/decode.py --images 5 16

Random weights of the real shapes (4.8 GB in bfloat16). Ours reads them from the file, which lies in the page cache;
theirs are loaded into memory beforehand, as their pipeline does. Both end with all factors of all 720 modules in
memory. With fewer ``--blocks`` than 60 it is quicker and says so.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from bench import in_turns, random_file, ratio, spread, usual  # before torch: how its threads wait

# isort: split
import torch

from i2l_ext.converters.architectures import QWEN_IMAGE
from i2l_ext.converters.files import TensorFile
from i2l_ext.decoder import DecoderSpec
from i2l_ext.decoder.decode import Decoder
from peers import diffsynth
from results import record, table


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[5, 16])
    parser.add_argument("--blocks", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="where to write the weights (default: a temporary folder)")
    args = parser.parse_args()

    arch = replace(QWEN_IMAGE, stacks=tuple(replace(s, depth=args.blocks) for s in QWEN_IMAGE.stacks))
    spec = DecoderSpec(arch, 5632, 64)
    models, merge = diffsynth("models.qwen_image_image2lora"), diffsynth("utils.lora.merge").merge_lora
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        path = random_file(Path(folder) / "style.safetensors", spec.shapes)
        with torch.device("meta"):
            peer = models.QwenImageImage2LoRAModel(args.blocks, use_residual=False, compress_dim=64)
        with TensorFile(path) as file:
            peer.load_state_dict({key: file.tensor(key) for key in spec.shapes}, assign=True)
        rows = []
        for count in args.images:
            x = torch.randn(count, 5632).bfloat16()

            def ours(x: torch.Tensor = x, count: int = count) -> None:
                with Decoder(path, spec) as decoder:
                    lora = decoder.lora(x, [1 / count] * count)
                    held = {module: lora[module] for module in lora}
                assert len(held) == 12 * args.blocks

            def theirs(x: torch.Tensor = x, count: int = count) -> None:
                merge([peer(x=one, residual=None) for one in x.split(1)], alpha=1 / count)

            seconds = in_turns({"ours": ours, "theirs": usual(theirs)}, args.rounds)
            rows.append([count, *(spread(seconds[who]) for who in ("ours", "theirs")),
                         ratio(seconds["theirs"], seconds["ours"])])  # fmt: skip
    text = f"{args.blocks} of 60 blocks, {args.rounds} rounds, seconds: median (least to most).\n\n"
    record(
        "Style decode, weights in page cache",
        text + table(["pictures", "ours", "reference", "times faster"], rows),
        script=__file__,
    )


if __name__ == "__main__":
    main()
