"""What loaders do with every spelling of a LoRA file (`spellings`), as recorded and as they do now."""

from pathlib import Path

import pytest
import torch

from i2l_ext.converters import Lora, consumers
from loaders import LOADERS, agrees, by_rules, outcome, recorded, recorded_outcomes
from spellings import QWEN, Spelling, Z, model, spellings

ROWS = spellings()
CHECKED = {
    "forge-neo": "forge-neo", "comfyui": "comfyui", "diffusers": "diffusers", "diffsynth": "diffsynth",
    "musubi-tuner": "musubi-tuner", "musubi-tuner --lora_weight": "musubi-tuner-lora-weight",
    "ai-toolkit": "ai-toolkit", "sdnext": "sdnext", "invokeai": "invokeai",
}  # fmt: skip
"""The programs of which the truth is known -> what `i2l check` calls them."""


def test_every_spelling_is_recorded():
    assert list(recorded()["rows"]) == [row.id for row in ROWS]
    assert all(Spelling.of(row.id) == row for row in ROWS)


@pytest.mark.parametrize("loader", LOADERS)
def test_the_record_is_what_the_loader_does(loader):
    rows = [row for row in ROWS if row.family == QWEN] if loader == "peft" else ROWS  # PEFT knows no model
    truth = recorded_outcomes(loader)
    found = {row.id: outcome(row, LOADERS[loader]) for row in rows}
    assert {id: words for id, words in found.items() if words != truth[id]} == {}


@pytest.mark.parametrize("loader", recorded()["loaders"])
def test_the_rules_tell_every_row(loader):
    truth, rules = recorded_outcomes(loader), recorded()["loaders"][loader]["rules"]
    assert {row.id for row in ROWS if by_rules(rules, row) != truth[row.id]} == set()


@pytest.mark.parametrize("family", [QWEN, Z])
def test_the_layers_are_those_of_the_real_class(family):
    from diffusers import QwenImageTransformer2DModel, ZImageTransformer2DModel

    with torch.device("meta"):
        if family == QWEN:
            real = QwenImageTransformer2DModel(num_layers=2)
        else:
            real = ZImageTransformer2DModel(n_layers=2, n_refiner_layers=1)
    layers = {path: layer for path, layer in real.named_modules() if isinstance(layer, torch.nn.Linear)}
    ours = model(family, full=True)
    assert {path: (layer.in_features, layer.out_features) for path, layer in layers.items()} == (
        ours.modules | ours.singles
    )


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What `i2l check` says of every row: {id: {consumer: verdict}}."""
    path = tmp_path_factory.mktemp("told") / "checked.safetensors"
    return {
        row.id: {verdict.consumer.id: verdict for verdict in consumers.check(row.save_header(path))[1]} for row in ROWS
    }


@pytest.mark.parametrize("loader", CHECKED)
def test_check_tells_what_the_loaders_do(told, loader):
    truth = recorded_outcomes(loader)
    said = {row.id: told[row.id][CHECKED[loader]] for row in ROWS}
    wrong = {
        row.id: (said[row.id].status, said[row.id].loads, truth[row.id])
        for row in ROWS
        if not agrees(row, truth[row.id], said[row.id].status, said[row.id].loads)
    }
    assert wrong == {}


SHOWN = (
    ("diffusion_model.", "A/B", "ours", "none"),
    ("diffusion_model.", "A/B", "ours", "half"),
    ("diffusion_model.", "A/B", "native", "none"),
    ("diffusion_model.", "down/up", "ours", "half"),
    ("transformer.", "A/B", "ours", "none"),
    ("transformer.", "A/B", "ours", "half"),
    ("transformer.", "A/B", "ours", "header"),
    ("transformer.", "down/up", "ours", "half"),
    ("", "A/B", "ours", "none"),
    ("", "A/B default", "ours", "none"),
    ("", "down/up", "ours", "half"),
    ("lora_unet_", "down/up", "ours", "half"),
    ("lora_unet_", "down/up", "native", "half"),
    ("lora_unet__", "down/up", "ours", "half"),
    ("lycoris_", "down/up", "ours", "half"),
    ("base_model.model.", "A/B", "ours", "none"),
    ("transformer._orig_mod.", "A/B", "ours", "none"),
)
"""Spellings that people have, for the documentation."""
SHORT = {"nothing": "-", "refused": "error", "ignores alpha": "strength", "wrong strength": "strength"}
SCALE_WORDS = {"none": "none", "half": "alpha", "header": "header"}


def table_of_programs(told):
    """What every program makes of common spellings, as docs/lora-files.md has it: of Qwen-Image, then of Z-Image."""
    shown = [one for one in consumers.CONSUMERS if one.models and one.rules]
    lines = [
        "| prefix | factors | names | scale | " + " | ".join(one.title for one in shown) + " |",
        "|---" * (len(shown) + 4) + "|",
    ]
    for prefix, suffix, names, scale in SHOWN:
        cells = [f"`{prefix}`" if prefix else "none", suffix, names, SCALE_WORDS[scale]]
        for one in shown:
            families = [told[Spelling(family, prefix, suffix, names, scale).id][one.id] for family in (QWEN, Z)]
            words = [SHORT.get(verdict.status, verdict.status) for verdict in families]
            cells.append(words[0] if words[0] == words[1] else ", ".join(words))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sources_of_programs():
    """How it is known, as docs/lora-files.md has it."""
    rows = [(one.title, one.source, one.version, one.date) for one in consumers.CONSUMERS]
    head = [("program", "how it is known", "version", "of"), ("---",) * 4]
    return "\n".join(f"| {' | '.join(cell or '-' for cell in row)} |" for row in [*head, *rows])


def test_the_documentation_has_what_check_says(told):
    docs = (Path(__file__).parent.parent / "docs" / "lora-files.md").read_text(encoding="utf-8")
    absent = [table for table in (table_of_programs(told), sources_of_programs()) if table not in docs]
    assert not absent, "\n\n".join(absent)


def test_what_is_not_loaded_right_has_a_repair_or_a_reason(told):
    """None is left without advice but what no command can read, and what the program does not have."""
    for id, verdicts in told.items():
        for verdict in verdicts.values():
            if verdict.status in ("all", "no model", "untried") or verdict.repair:
                continue
            row = Spelling.of(id)
            unreadable = row.names in ("no up", "no down") or row.scale == "stale"
            assert unreadable or row.names == "singles" or verdict.consumer.lacks, (id, verdict)
            assert verdict.detail


def test_a_convert_that_is_advised_makes_every_spelling_load(told, tmp_path):
    """Every seventeenth row is really converted: by then every prefix, suffix, kind of name and scale was there."""
    broken, repaired = tmp_path / "broken.safetensors", tmp_path / "repaired.safetensors"
    for row in ROWS[::17]:
        asked = {
            consumer: verdict.repair.options["key_format"]
            for consumer, verdict in told[row.id].items()
            if verdict.repair and verdict.repair.operation == "convert"
        }
        lora = Lora.read(row.save(broken, full=True)) if asked else None
        for key_format in set(asked.values()):
            lora.save(repaired, key_format, overwrite=True)
            again = {verdict.consumer.id: verdict for verdict in consumers.check(repaired)[1]}
            for verdict in (again[consumer] for consumer, to in asked.items() if to == key_format):
                by_default = verdict.consumer.lacks and verdict.status == "part"
                assert verdict.status == "all" or by_default, (row.id, verdict)


def test_of_a_fused_layer_and_its_parts_the_parts_are_read(tmp_path):
    row = Spelling(QWEN, "diffusion_model.", "A/B", "both")
    lora = Lora.read(row.save(tmp_path / "both", full=True))
    assert len(lora) == len(row.updates())
    path = "transformer_blocks.0.attn.add_k_proj"
    down, up = lora[path]
    own = {layer.name: layer for layer in row.layers(full=True)}[path]
    assert torch.equal(down, own.down) and torch.equal(up, own.up)
