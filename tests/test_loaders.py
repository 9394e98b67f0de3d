"""What loaders do with every spelling of a LoRA file (`spellings`), as recorded and as they do now."""

import pytest
import torch

from i2l_ext.converters import UserError, consumers
from loaders import LOADERS, agrees, by_rules, outcome, recorded, recorded_outcomes
from spellings import QWEN, Spelling, Z, model, spellings

ROWS = spellings()
CHECKED = ("forge-neo", "comfyui", "diffusers", "diffsynth", "musubi-tuner", "ai-toolkit")
"""The programs that `i2l check` tells of and of which the truth is known."""


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


def told_wrongly(path):
    """The rows that `i2l check` tells otherwise than the loader does: (program, id, what it said, the truth)."""
    wrong = []
    for row in ROWS:
        try:
            said = {verdict.consumer.id: verdict for verdict in consumers.check(row.save(path, full=True))[1]}
        except UserError as error:
            said = {}
            refusal = str(error)
        for loader in CHECKED:
            truth = recorded_outcomes(loader)[row.id]
            verdict = said.get(loader)
            if verdict is None:
                wrong.append((loader, row.id, f"refused: {refusal}", truth))
            elif not agrees(row, truth, verdict.status, verdict.loads):
                wrong.append((loader, row.id, f"{verdict.status} {verdict.loads}", truth))
    return wrong


@pytest.mark.xfail(strict=True, reason="consumers go by the name of a dialect, not by prefix, suffix, names and alpha")
def test_check_tells_what_the_loaders_do(tmp_path):
    assert told_wrongly(tmp_path / "checked.safetensors") == []
