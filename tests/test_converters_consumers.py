"""The table of consumers, held against the loaders that a package registry has: diffusers, PEFT, diffsynth."""

import json
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch

from i2l_ext.converters import Lora, UserError, consumer_table, consumers, key_formats
from i2l_ext.converters.architectures import ARCHITECTURES, KLEIN_4B, MINI, QWEN_IMAGE, Z_IMAGE
from peers import diffsynth
from spellings import Spelling
from test_converters_commands import i2l

CONSUMERS = {consumer.id: consumer for consumer in consumers.CONSUMERS}
ALL_KEY_FORMATS = {
    key_format.name: key_format for key_format in (*key_formats.KEY_FORMATS.values(), *key_formats.VARIANTS)
}


def random(arch, paths, rank=2, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def pair(path):
        d_out, d_in = arch.modules[path].shape
        return torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)

    return Lora.of(arch, {path: pair(path) for path in paths})


def tensors(lora, name, tmp_path, alpha=True, scale=1.0):
    """The state dict of ``lora`` in a key format, with an alpha of ``scale`` x rank."""
    key_format, made = ALL_KEY_FORMATS[name], {}
    if key_format.native:
        lora.save(tmp_path / "native", name, overwrite=True)
        return safetensors.torch.load_file(tmp_path / "native")
    for path in lora:
        down, up, key = key_format.keys(path)
        made[down], made[up] = (factor.clone() for factor in lora[path])
        if alpha and (key or scale != 1):
            made[key or down.split(".lora_")[0] + ".alpha"] = torch.tensor(scale * lora.specs[path].rank)
    return made


def verdicts(tmp_path, state):
    path = tmp_path / "checked.safetensors"
    safetensors.torch.save_file(state, path)
    return {verdict.consumer.id: verdict for verdict in consumers.check(path)[1]}


def base(family):
    """The real class at full width and one block of each stack; its memory is reserved and never touched."""
    from diffusers import Flux2Transformer2DModel, QwenImageTransformer2DModel, ZImageTransformer2DModel

    with torch.device("meta"):
        if family == "qwen-image":
            model = QwenImageTransformer2DModel(num_layers=1)
        elif family == "flux2":  # klein 4B
            model = Flux2Transformer2DModel(
                num_layers=1, num_single_layers=1, num_attention_heads=24, joint_attention_dim=7680,
                guidance_embeds=False,
            )  # fmt: skip
        else:
            model = ZImageTransformer2DModel(n_layers=1, n_refiner_layers=1)
    return model.to_empty(device="cpu")


def act(down, up):
    probe = torch.randn(down.shape[1], 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return up.double() @ (down.double() @ probe)


def diffusers_loads(family, state, lora):
    """How many modules diffusers' own loader sets to exactly our update; None where it ends in an error."""
    from diffusers.loaders.lora_pipeline import Flux2LoraLoaderMixin, QwenImageLoraLoaderMixin, ZImageLoraLoaderMixin

    mixin = {"qwen-image": QwenImageLoraLoaderMixin, "flux2": Flux2LoraLoaderMixin}.get(family, ZImageLoraLoaderMixin)
    model = base(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model.load_lora_adapter(mixin.lora_state_dict(dict(state)), prefix="transformer", adapter_name="x")
        except ValueError:  # PEFT: no target module found
            return None
    loaded = 0
    for path in lora:
        layer = model.get_submodule(path)
        if "x" in getattr(layer, "lora_A", {}):
            found = layer.scaling["x"] * act(layer.lora_A["x"].weight, layer.lora_B["x"].weight)
            loaded += torch.allclose(found, act(*lora[path]), rtol=1e-5, atol=1e-4)
    return loaded


def diffsynth_loads(state, lora):
    loader = diffsynth("utils.lora.general").GeneralLoRALoader()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = loader.convert_state_dict(dict(state))
        except (KeyError, ValueError):
            return None
    pairs = {path: (found.get(f"{path}.lora_A.weight"), found.get(f"{path}.lora_B.weight")) for path in lora}
    return sum(
        down is not None and torch.allclose(act(down, up), act(*lora[path]), rtol=1e-5, atol=1e-4)
        for path, (down, up) in pairs.items()
    )


def first_blocks(arch):
    return [path for path, module in (arch.i2l_modules or arch.modules).items() if module.block == 0]


@pytest.mark.parametrize("arch", [QWEN_IMAGE, Z_IMAGE, KLEIN_4B], ids=lambda arch: arch.id)
@pytest.mark.parametrize("name", ALL_KEY_FORMATS)
def test_the_table_says_what_diffusers_and_diffsynth_do(tmp_path, arch, name):
    lora = random(arch, first_blocks(arch))
    state = tensors(lora, name, tmp_path)
    said = verdicts(tmp_path, state)
    found = {"diffusers": diffusers_loads(arch.family, state, lora), "diffsynth": diffsynth_loads(state, lora)}
    assert {program: said[program].loads for program in found} == {one: loads or 0 for one, loads in found.items()}
    refused = {program for program in found if said[program].status == "refused"}
    assert refused == {program for program, loads in found.items() if loads is None}


@pytest.mark.parametrize("arch", [QWEN_IMAGE, Z_IMAGE], ids=lambda arch: arch.id)
def test_the_architecture_has_the_linear_layers_of_the_class(arch):
    layers = {name: layer for name, layer in base(arch.family).named_modules() if isinstance(layer, torch.nn.Linear)}
    known = {path: module.shape for path, module in arch.modules.items() if module.block in (0, None)}
    assert {name: (layer.out_features, layer.in_features) for name, layer in layers.items()} == known


@pytest.mark.parametrize("arch", [QWEN_IMAGE, Z_IMAGE], ids=lambda arch: arch.id)
@pytest.mark.parametrize("name", ["webui", "kohya", "diffusers", "diffsynth"])
def test_diffusers_loads_every_module_of_the_class(tmp_path, arch, name):
    """Also those that i2L does not write: the single layers outside the blocks."""
    paths = [path for path, module in arch.modules.items() if module.block in (0, None)]
    lora = random(arch, paths)
    assert diffusers_loads(arch.family, tensors(lora, name, tmp_path), lora) == len(paths)


def test_alpha_that_is_not_the_rank(tmp_path):
    lora = random(QWEN_IMAGE, first_blocks(QWEN_IMAGE), rank=4)
    half = lora.scaled(0.5)
    for name in ("webui", "kohya"):
        state = tensors(lora, name, tmp_path, scale=0.5)
        said = verdicts(tmp_path, state)
        assert said["forge-neo"].status == said["comfyui"].status == "all"
        # The version here honours alpha in every key format; 0.40 dropped it beside lora_A and lora_B: told.
        assert diffusers_loads("qwen-image", state, half) == len(lora)
        assert said["diffusers"].status == "all"
        assert name == "kohya" or "before version 0.42" in said["diffusers"].detail
        if name == "webui":
            assert diffsynth_loads(state, half) == len(lora) and said["diffsynth"].status == "all"
            assert said["ai-toolkit"].status == "ignores alpha" and "2 times" in said["ai-toolkit"].detail
            assert said["nunchaku"].status == "ignores alpha" and "fused" in said["nunchaku"].detail
        else:
            assert said["musubi-tuner"].status == "ignores alpha" and "2 times" in said["musubi-tuner"].detail


FORMATS = [
    ("qwen-image", "webui"),
    ("qwen-image", "kohya"),
    ("qwen-image", "diffusers"),
    ("qwen-image", "diffsynth"),
    ("z-image", "webui"),
    ("z-image", "kohya"),
    ("z-image", "kohya-fused"),
    ("z-image", "diffusers"),
    ("z-image", "diffsynth"),
]
TABLE = {
    "forge-neo": "all all all all all refused all all all",
    "comfyui": "all all all all all part all all all",
    "forge": "no no no no no no no no no",
    "a1111": "no no no no no no no no no",
    "diffusers": "all all all all all all all all all",
    "diffsynth": "all nothing nothing all all nothing nothing nothing all",
    "musubi-tuner": "nothing all nothing nothing nothing part part nothing nothing",
    "ai-toolkit": "all nothing all nothing part nothing nothing part nothing",
    "flymyai": "nothing nothing nothing nothing no no no no no",
    "nunchaku": "all nothing all all untried untried untried untried untried",
    "sdnext": "all all all all all all all all all",
    "invokeai": "nothing all all all all nothing nothing all nothing",
    "musubi-tuner-lora-weight": "nothing all nothing nothing nothing all part nothing nothing",
    "sd-cpp": "all all all all all part part all nothing",
    "simpletuner": "nothing nothing part nothing nothing nothing nothing part nothing",
}
"""Consumer -> the first word of what it does with a file of each of FORMATS."""


@pytest.mark.parametrize(("family", "name"), FORMATS)
def test_the_table_of_key_formats(tmp_path, family, name):
    arch = {"qwen-image": QWEN_IMAGE, "z-image": Z_IMAGE}[family]
    said = verdicts(tmp_path, tensors(random(arch, first_blocks(arch)), name, tmp_path))
    known = {id: one.status.split()[0] for id, one in said.items() if one.consumer.source != consumer_table.NOT_TRIED}
    place = FORMATS.index((family, name))
    told = {id: dict(enumerate(row.split())).get(place, "(no word)") for id, row in TABLE.items()}
    assert known == told, "\n".join(f"{id}: {known[id]}" for id in known if known[id] != told.get(id))


def test_a_program_that_nobody_tried_says_so(tmp_path, monkeypatch):
    new = consumer_table.Consumer("new", "New", consumer_table.NOT_TRIED)
    monkeypatch.setattr(consumers, "CONSUMERS", (*consumers.CONSUMERS, new))
    said = verdicts(tmp_path, tensors(random(Z_IMAGE, first_blocks(Z_IMAGE)), "webui", tmp_path))
    assert (said["new"].status, said["new"].detail) == ("untried", "nobody here has tried it")
    for arch in (Z_IMAGE, KLEIN_4B):
        said = verdicts(tmp_path, tensors(random(arch, first_blocks(arch)), "webui", tmp_path))
        assert said["onetrainer"].detail == "tried only with the start folder that is written for it"


def test_part_says_which(tmp_path):
    lora = random(Z_IMAGE, first_blocks(Z_IMAGE))
    said = verdicts(tmp_path, tensors(lora, "kohya", tmp_path))
    assert said["musubi-tuner"].loads == 7
    assert "2 attention.to_q" in said["musubi-tuner"].detail
    repair = said["musubi-tuner"].repair
    assert repair.operation == "export" and repair.options == {"trainer": "musubi-tuner", "rank": 2}
    assert said["comfyui"].loads == 9 and "attention" in said["comfyui"].detail


def test_mixed_files_load_in_part(tmp_path):
    first, second, third, *_ = MINI.i2l_modules
    state = tensors(random(MINI, [first, second]), "webui", tmp_path) | tensors(
        random(MINI, [third]), "kohya", tmp_path
    )
    said = verdicts(tmp_path, state)
    assert (said["musubi-tuner"].status, said["musubi-tuner"].loads) == ("part", 1)
    assert (said["ai-toolkit"].status, said["ai-toolkit"].loads) == ("part", 2)
    assert said["forge-neo"].status == "all"


def test_kohya_without_alpha(tmp_path):
    lora = random(QWEN_IMAGE, first_blocks(QWEN_IMAGE))
    said = verdicts(tmp_path, tensors(lora, "kohya", tmp_path, alpha=False))
    assert diffusers_loads("qwen-image", tensors(lora, "kohya", tmp_path, alpha=False), lora) == len(lora)
    assert said["diffusers"].status == "all" and "before version 0.42: a KeyError" in said["diffusers"].detail
    assert said["forge-neo"].status == "all"


def checked(path):
    return {verdict.consumer.id: verdict for verdict in consumers.check(path)[1]}


def test_a_scale_that_stands_in_the_header_alone(tmp_path):
    """alpha 8 at rank 4: diffusers applies it, and who does not is told by how much it is wrong."""
    said = checked(Spelling("qwen-image", "transformer.", "A/B", "ours", "header").save_header(tmp_path / "f"))
    assert said["diffusers"].status == "all"
    for program in ("comfyui", "forge-neo", "ai-toolkit"):
        assert said[program].status == "ignores alpha" and said[program].loads == 28
        assert "header" in said[program].detail and "0.5 times" in said[program].detail
        assert said[program].repair == consumers.Repair("convert", {"key_format": "webui"})
    patterns = checked(Spelling("qwen-image", "transformer.", "A/B", "ours", "pattern").save_header(tmp_path / "f"))
    assert "0.25 to 0.5 times" in patterns["comfyui"].detail


def test_a_scale_that_stands_beside_the_file(tmp_path):
    spelling = Spelling("qwen-image", "transformer.", "A/B", "ours", "none")
    spelling.save_header(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 16}))
    said = checked(tmp_path)
    for program in ("comfyui", "diffusers"):
        assert said[program].status == "ignores alpha" and "0.25 times" in said[program].detail
        assert "adapter_config.json" in said[program].detail and said[program].repair.operation == "convert"


@pytest.mark.parametrize("missing", ["up", "down"])
def test_a_factor_that_is_missing(tmp_path, missing):
    said = checked(Spelling("qwen-image", "diffusion_model.", "A/B", f"no {missing}").save_header(tmp_path / "f"))
    errors = {"diffusers", "invokeai"} | ({"comfyui", "forge-neo", "diffsynth"} if missing == "down" else set())
    for program in errors - {"invokeai"}:
        assert said[program].status == "refused" and "transformer_blocks.0.attn.to_q" in said[program].detail
        assert "no repair" in said[program].detail and said[program].repair is None
    for program in {"comfyui", "diffsynth", "ai-toolkit"} - errors:
        assert (said[program].status, said[program].loads) == ("all", 27)
        assert "1 left out that have one factor only" in said[program].detail


def test_one_strange_layer_and_diffusers_refuses_the_file(tmp_path):
    state = Spelling("qwen-image", "diffusion_model.", "A/B").tensors(full=True)
    for letter in "AB":
        stem = f"diffusion_model.transformer_blocks.1.attn.to_q.lora_{letter}"
        state[stem] = state.pop(f"{stem}.weight")
    said = verdicts(tmp_path, state)
    assert said["diffusers"].status == "refused" and "transformer_blocks.1.attn.to_q" in said["diffusers"].detail
    assert said["comfyui"].status == "all"
    assert said["ai-toolkit"].status == "part" and said["ai-toolkit"].loads == 27


def test_a_layer_that_is_there_fused_and_by_itself(tmp_path):
    said = checked(Spelling("z-image", "diffusion_model.", "A/B", "both").save_header(tmp_path / "f"))
    assert said["comfyui"].status == "wrong strength" and "12 modules are there twice" in said["comfyui"].detail
    assert said["comfyui"].repair.operation == "convert"
    assert said["diffusers"].status == "all"


def test_what_is_described_although_nothing_reads_it(tmp_path):
    """One factor, and nothing else; and two keys for one module."""
    one = Spelling("qwen-image", "diffusion_model.", "A/B").tensors(full=True)
    stem = "transformer_blocks.0.attn.to_q.lora_"
    half = verdicts(tmp_path, {f"diffusion_model.{stem}A.weight": one[f"diffusion_model.{stem}A.weight"]})
    assert half["comfyui"].status == "nothing" and "no module has both factors" in half["comfyui"].detail
    twice = {f"{prefix}{stem}{letter}.weight": one[f"diffusion_model.{stem}{letter}.weight"].clone()
             for prefix in ("diffusion_model.", "transformer.") for letter in "AB"}  # fmt: skip
    said = verdicts(tmp_path, twice)
    assert "not tried" in said["comfyui"].detail and "no repair" in said["musubi-tuner"].detail


def test_ranks_that_differ(tmp_path):
    query, key, *_ = MINI.i2l_modules
    state = tensors(random(MINI, [query], 2), "webui", tmp_path) | tensors(random(MINI, [key], 3), "webui", tmp_path)
    said = verdicts(tmp_path, state)
    assert said["nunchaku"].status == "refused" and said["nunchaku"].repair == consumers.Repair("rank", {"rank": 3})
    kohya = tensors(random(MINI, [query], 2), "kohya", tmp_path) | tensors(random(MINI, [key], 3), "kohya", tmp_path)
    assert verdicts(tmp_path, kohya)["musubi-tuner"].status == "refused"


@pytest.mark.parametrize("arch", [QWEN_IMAGE, Z_IMAGE], ids=lambda arch: arch.id)
@pytest.mark.parametrize("name", ALL_KEY_FORMATS)
def test_every_convert_that_is_advised_repairs(tmp_path, arch, name):
    path = tmp_path / "broken.safetensors"
    safetensors.torch.save_file(tensors(random(arch, first_blocks(arch)), name, tmp_path), path)
    for index, verdict in enumerate(consumers.check(path)[1]):
        if not verdict.repair or verdict.repair.operation != "convert":
            continue
        repaired = tmp_path / f"repaired{index}.safetensors"
        assert i2l("convert", path, "--to", verdict.repair.options["key_format"], "-o", repaired) == 0
        again = {v.consumer.id: v for v in consumers.check(repaired)[1]}[verdict.consumer.id]
        by_default = again.consumer.lacks and again.status == "part"
        assert again.status == "all" or (again.repair and again.repair.operation == "export") or by_default


def test_check_command(tmp_path, capsys):
    path = tmp_path / "a file.safetensors"
    random(QWEN_IMAGE, first_blocks(QWEN_IMAGE)).save(path)
    assert i2l("check", path) == 0
    told = capsys.readouterr().out
    assert "Forge Neo" in told and f"i2l convert '{path}' --to kohya" in told
    assert i2l("check", path, "--json") == 0
    table = json.loads(capsys.readouterr().out)["consumers"]
    assert [entry["consumer"] for entry in table] == list(CONSUMERS)
    assert all(entry["source"] for entry in table)


def test_summary_names_who_loads_it_and_who_needs_help(tmp_path):
    path = tmp_path / "f.safetensors"
    block = {module: m for module, m in QWEN_IMAGE.i2l_modules.items() if m.block == 0}
    random(QWEN_IMAGE, block).save(path)
    told = consumers.summary(path)
    assert told.startswith("loads in Forge Neo, ComfyUI, diffusers") and "\n" not in told
    repairable = "musubi-tuner, flymyai-lora-trainer, InvokeAI, musubi-tuner --lora_weight, SimpleTuner"
    assert f"for {repairable}: i2l check {path}" in told


def test_a_miniatures_lora_is_told_to_be_one(tmp_path):
    random(MINI, MINI.i2l_modules).save(tmp_path / "f")
    assert consumers.summary(tmp_path / "f") == MINI.caution


def test_check_says_in_one_line_that_only_draw_can_use_it(tmp_path, capsys):
    for arch, told in ((MINI, True), (QWEN_IMAGE, False)):
        random(arch, first_blocks(arch)).save(tmp_path / arch.id)
        assert i2l("check", tmp_path / arch.id) == 0
        out = capsys.readouterr().out
        assert (len(out.splitlines()) == 1 and "; Test LoRA: only `i2l draw` can use it." in out) == told
        assert ("Forge Neo" in out) != told
        assert i2l("check", tmp_path / arch.id, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert bool(found["caution"]) == told
        loading = [one for one in found["consumers"] if one["loads"]]
        assert loading and all(one["detail"].startswith("by names only") == told for one in loading)


def test_check_of_what_is_no_lora(tmp_path):
    safetensors.torch.save_file({"x": torch.ones(1)}, tmp_path / "f")
    with pytest.raises(UserError, match="not a LoRA"):
        i2l("check", tmp_path / "f")


def test_a_full_file_of_720_modules_of_rank_20(tmp_path):
    """bfloat16 as `i2l make` writes it; the class holds the blocks for which there is room here."""
    from i2l_ext.converters import select
    from i2l_ext.converters.lora import FactorSpec

    def load(path):
        d_out, d_in = QWEN_IMAGE.modules[path].shape
        seed = torch.tensor([len(path), d_out % 97, d_in % 89]).repeat(max(d_out, d_in))
        return (
            (seed[:d_in].repeat(20, 1) / 97).bfloat16() * torch.arange(1, 21)[:, None].bfloat16(),
            (seed[:d_out, None].repeat(1, 20) / 89).bfloat16(),
        )

    path = tmp_path / "full.safetensors"
    Lora(QWEN_IMAGE, dict.fromkeys(QWEN_IMAGE.i2l_modules, FactorSpec(20, "BF16")), load).save(path)
    assert len(Lora.read(path)) == 720
    assert path.stat().st_size == pytest.approx(295e6, rel=0.01)
    for name in ("webui", "kohya", "diffusers", "diffsynth"):
        part = select(Lora.read(path), "0")
        part.save(tmp_path / "part", name, overwrite=True)
        state = safetensors.torch.load_file(tmp_path / "part")
        assert diffusers_loads("qwen-image", state, part) == len(part) == 12


KLEIN = json.loads((Path(__file__).parent / "recorded" / "klein.json").read_text(encoding="utf-8"))["programs"]


@pytest.mark.parametrize("program", KLEIN)
def test_check_says_of_klein_what_the_loaders_did(tmp_path, program):
    """ComfyUI does not know diffusers' names behind ``diffusion_model.``; musubi-tuner ends where ranks differ."""
    for name, words in KLEIN[program]["outcomes"].items():
        key_format, _, scale = name.partition(", ")
        random(KLEIN_4B, first_blocks(KLEIN_4B)).save(tmp_path / "f", key_format, overwrite=True)
        state = safetensors.torch.load_file(tmp_path / "f")
        if scale == "half":
            down = ALL_KEY_FORMATS[key_format].down
            ranks = {key.removesuffix(down): factor.shape[0] for key, factor in state.items() if key.endswith(down)}
            state |= {f"{stem}.alpha": torch.tensor(rank / 2) for stem, rank in ranks.items()}
        said = verdicts(tmp_path, state)[program]
        expected = {"whole": "all", "nothing": "nothing"}.get(words, "refused")
        if words.startswith("whole, x"):
            expected = "ignores alpha" if words == "whole, x2 to x2" else "refused"
        assert said.status == expected, (name, words, said)
        assert said.consumer.source == consumer_table.TRIED


def test_what_is_advised_of_klein_repairs(tmp_path):
    path = tmp_path / "klein.safetensors"
    random(KLEIN_4B, first_blocks(KLEIN_4B)).save(path, "webui")
    said = checked(path)
    assert said["comfyui"].repair == consumers.Repair("convert", {"key_format": "webui-fused"})
    assert said["musubi-tuner"].repair.operation == said["ai-toolkit"].repair.operation == "export"
    assert said["musubi-tuner-lora-weight"].repair == consumers.Repair("convert", {"key_format": "kohya-fused"})
    for program in ("comfyui", "musubi-tuner-lora-weight", "simpletuner"):
        fixed = tmp_path / f"{program}.safetensors"
        assert i2l("convert", path, "--to", said[program].repair.options["key_format"], "-o", fixed) == 0
        assert checked(fixed)[program].status == "all"
    assert said["forge-neo"].status == "untried" and said["a1111"].status == said["flymyai"].status == "no model"


@pytest.mark.parametrize("arch", ARCHITECTURES.values(), ids=lambda arch: arch.id)
def test_an_architectures_own_key_format_is_read_by_the_programs_that_run_it(tmp_path, arch):
    """Wherever nobody says `--to`: by the programs that we are part of, and diffusers, where the model was tried."""
    path = tmp_path / "own.safetensors"
    random(arch, first_blocks(arch)).save(path)
    said = {name: verdict.status for name, verdict in checked(path).items()}
    programs = ("forge-neo", "comfyui", "diffusers", "sdnext")
    told = {said[program] for program in programs if said[program] not in ("untried", "no model")}
    assert told == ({"all"} if arch.family in consumer_table.FAMILIES else set())


def test_a_lora_is_converted_to_its_models_own_key_format(tmp_path):
    """And written so by `Lora.save`, unless another is named."""
    path, back = tmp_path / "klein.safetensors", tmp_path / "back.safetensors"
    random(KLEIN_4B, first_blocks(KLEIN_4B)).save(path, "webui")
    assert i2l("convert", path, "-o", back) == 0
    assert Lora.read(back).read_from.reading.key_format == "diffusers"
    assert i2l("convert", path, "--to", "webui", "-o", back, "--overwrite") == 0
    assert Lora.read(back).read_from.reading.key_format == "webui"
    assert i2l("convert", path) == 0 and (tmp_path / "klein_diffusers.safetensors").is_file()


@pytest.mark.parametrize("arch", [QWEN_IMAGE, Z_IMAGE, KLEIN_4B], ids=lambda arch: arch.id)
def test_comfyui_reads_the_names_that_our_node_gives_it(tmp_path, arch):
    from i2l_ext.comfyui.load_node import plain_tensors

    said = verdicts(tmp_path, plain_tensors(random(arch, first_blocks(arch))))
    assert said["comfyui"].status == "all"
