"""``<i2l:...>`` in a WebUI: the tag, the names, and a generation in a stand-in that calls in Forge Neo's order."""

import gc
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from branch_models import MINI, hooks_of, lora_of, merged, qwen
from i2l_ext.converters import UserError
from i2l_ext.webui.hosts import webui
from i2l_ext.webui.prompt_tags import BranchTag, parse_tag
from test_branch_diffusers import close, generate, guided_by, pipeline
from test_branch_guidance import PICTURES, HostModel, call

pytest.importorskip("diffusers")


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("s", BranchTag("s")),
        ("s:0.8", BranchTag("s", 0.8)),
        ("s:0.8:0", BranchTag("s", 0.8, 0.0)),
        ("s:0.8:-0.5", BranchTag("s", 0.8, -0.5)),
        ("s:0.8:both", BranchTag("s", 0.8, 0.8, True)),
        ("s:0.8:from=0.2:to=0.9", BranchTag("s", 0.8, None, False, 0.2, 0.9)),
        (" s : 1 : Both : to=0.5", BranchTag("s", 1.0, 1.0, True, 0.0, 0.5)),
        ("s:", BranchTag("s")),
    ],
)
def test_a_tag_is_read(text, tag):
    assert parse_tag(text.split(":")) == tag


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (":1", "<i2l::1>: has no name"),
        ("s:much", "the weight must be a number, not 'much'"),
        ("s:1:nan", "the negative weight must be a number, not 'nan'"),
        ("s:1:0:2", "too many numbers"),
        ("s:1:from=0.9:to=0.2", "from is the smaller one"),
        ("s:1:to=2", "from 0 to 1"),
        ("s:1:te=2", "te= is not known"),
        ("s:1:from=soon", "from must be a number, not 'soon'"),
    ],
)
def test_a_wrong_tag_is_said_in_one_line(text, told):
    with pytest.raises(UserError, match=told.replace("(", r"\(")):
        parse_tag(text.split(":"))


class Unet:
    """Forge's patcher: a clone has options of its own and the same model."""

    def __init__(self, diffusion_model, options=()):
        self.model = SimpleNamespace(diffusion_model=diffusion_model)
        self.model_options, self.preserved = {"transformer_options": dict(options)}, 0

    def clone(self):
        return Unet(self.model.diffusion_model, self.model_options["transformer_options"])

    def set_transformer_option(self, key, value):
        self.model_options["transformer_options"][key] = value

    def add_extra_preserved_memory_during_sampling(self, size):
        self.preserved += size


class Host:
    """A stand-in for Forge Neo: the parts of its `modules` that the extension sees, and its order of calls."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        for name in [
            name
            for name in sys.modules
            if name == "modules" or name.startswith(("modules.", "i2l_ext.webui.hosts.gen"))
        ]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(Path(__file__).with_name("fake_host"))
        monkeypatch.setenv("FAKE_ROOT", str(folder))
        networks = ModuleType("networks")
        networks.available_networks, networks.available_network_aliases = {}, {}
        networks.forbidden_network_aliases, networks.looked = {"none", "twice"}, []

        def look(names):
            networks.looked.append(names)
            for path in folder.glob("*.safetensors"):
                if path.stem in names:
                    self.know(path)

        networks.update_available_networks_by_names = look
        monkeypatch.setitem(sys.modules, "networks", networks)
        self.networks = networks
        self.extra_networks, script_callbacks = map(
            import_module, ("modules.extra_networks", "modules.script_callbacks")
        )
        self.generation = import_module("i2l_ext.webui.hosts.generation")
        webui.register_network(self.generation.BranchNetwork(True))
        for function in script_callbacks.before_ui:
            function()
        self.script = self.generation.BranchScript()
        self.load(qwen())

    def know(self, path, alias=None):
        entry = SimpleNamespace(filename=str(path))
        self.networks.available_networks[path.stem] = entry
        self.networks.available_network_aliases |= {path.stem: entry, alias or path.stem: entry}

    def load(self, transformer):
        self.model = HostModel(transformer)
        self.sd_model = SimpleNamespace(forge_objects_after_applying_lora=Unet(self.model))

    def generate(self, prompt, *passes, negative=True, **other):
        """Predictions of each pass of sampling, for [1, 0] or [0]; the comments; the infotext's lines."""
        p = SimpleNamespace(sd_model=self.sd_model, extra_generation_params={}, comments={})
        p.comment = lambda text: p.comments.__setitem__(text, 1)
        found = []
        for text in (prompt, *passes):
            clean, data = self.extra_networks.parse_prompt(text)
            assert "<" not in clean
            self.sd_model.forge_objects = SimpleNamespace(unet=self.sd_model.forge_objects_after_applying_lora)
            self.extra_networks.activate(p, data)
            self.script.after_extra_networks_activate(p, extra_network_data=data)
            self.sd_model.forge_objects = SimpleNamespace(unet=self.sd_model.forge_objects_after_applying_lora)
            self.script.process_before_every_sampling(p, x=None)
            options = self.sd_model.forge_objects.unet.model_options["transformer_options"]
            branches = [1, 0] if negative else [0]
            for level in (1.0, 0.7):  # the pass begins, and three tenths of its steps are done
                prediction = call(self.model, branches, options | other, sigma=level)
            found.append(prediction)
            self.script.postprocess_batch(p)
        return SimpleNamespace(passes=found, comments=list(p.comments), infotext=p.extra_generation_params)


@pytest.fixture
def host(tmp_path, monkeypatch):
    return Host(tmp_path, monkeypatch)


@pytest.fixture
def style(host):
    return saved(host, "style", 1)


def saved(host, name, seed, **other):
    lora = lora_of(MINI, seed=seed, **other)
    lora.save(host.folder / f"{name}.safetensors")
    return lora


def expected(positive=(), negative=()):
    """[negative, positive] of two models with LoRAs merged: pairs of LoRA and weight."""
    pair = [call(HostModel(merged(qwen(), *loras)), [branch], {}) for branch, loras in ((1, negative), (0, positive))]
    return torch.cat(pair)


def near(found, wanted):
    return float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_the_positive_branch_alone_and_removed_without_a_trace(host, style):
    before, plain = hooks_of(host.model), host.generate("a cat").passes[0]
    made = host.generate("a cat <i2l:style:0.8>")
    assert near(made.passes[0], expected([(style, 0.8)]))
    assert made.infotext == {"i2l LoRAs": "style 0.8 0"} and made.comments == []
    assert near(host.generate("a cat <i2l:style:0.8>", negative=False).passes[0], expected([(style, 0.8)])[PICTURES:])
    assert torch.equal(host.generate("a cat").passes[0], plain) and hooks_of(host.model) == before


@pytest.mark.parametrize(
    ("tag", "positive", "negative"),
    [("style:0.8", 0.8, ("grey", 0.8)), ("style:0.8:0.3", 0.8, ("grey", 0.3)), ("style:0.8:0", 0.8, None),
     ("style:0.8:both", 0.8, ("style", 0.8))],
)  # fmt: skip
def test_a_grey_lora_of_the_same_name_is_on_the_negative_branch(host, style, tag, positive, negative):
    grey = saved(host, "style-grey", 2, rank=2)
    on_negative = [({"grey": grey, "style": style}[negative[0]], negative[1])] if negative else []
    made = host.generate(f"<i2l:{tag}> a cat")
    assert near(made.passes[0], expected([(style, positive)], on_negative))
    assert ("style-grey" in made.infotext["i2l LoRAs"]) == bool(negative and negative[0] == "grey")


def test_without_a_grey_one_the_lora_itself_has_the_negative_weight(host, style):
    assert near(host.generate("<i2l:style:1:-0.5>").passes[0], expected([(style, 1)], [(style, -0.5)]))


def test_several_add_up(host, style):
    other = saved(host, "other", 3)
    made = host.generate("a <i2l:style:0.5> cat <i2l:other:0.7:both>")
    assert near(made.passes[0], expected([(style, 0.5), (other, 0.7)], [(other, 0.7)]))
    assert made.infotext == {"i2l LoRAs": "style 0.5 0; other 0.7 0.7"}


def test_steps(host, style):
    for tag, acts in (("from=0.2:to=0.9", True), ("from=0.5", False), ("to=0.3", False), ("from=0.3", True)):
        made = host.generate(f"<i2l:style:1:{tag}>")
        assert near(made.passes[0], expected([(style, 1)] if acts else []))
        assert "from" in made.infotext["i2l LoRAs"]


def test_the_hires_pass_has_its_own_prompt(host, style):
    both = host.generate("<i2l:style:1>", "<i2l:style:0.4>").passes
    assert near(both[0], expected([(style, 1)])) and near(both[1], expected([(style, 0.4)]))
    both = host.generate("<i2l:style:1>", "no tag").passes
    assert near(both[0], expected([(style, 1)])) and torch.equal(both[1], host.generate("").passes[0])


def test_factors_are_kept_between_pictures_and_follow_a_change_of_the_model(host, style):
    from i2l_ext.branch.adapter import _adapters

    host.generate("<i2l:style:1>")
    kept = _adapters[host.model][1]
    host.generate("<i2l:style:0.3:0.1:to=0.5>")
    assert _adapters[host.model][1] is kept, "only the strengths differ"
    old = host.model
    host.load(qwen())
    assert near(host.generate("<i2l:style:1>").passes[0], expected([(style, 1)]))
    host.generate("no tag")
    assert host.model not in _adapters and old in _adapters


def test_memory_is_asked_of_the_host(host, style):
    host.generate("<i2l:style:1>")
    factors = sum(tensor.nbytes for path in style for tensor in style[path])
    assert host.sd_model.forge_objects.unet.preserved == factors


def test_names_resolve_as_the_hosts_do(host, style):
    host.know(host.folder / "style.safetensors", alias="my alias")
    assert near(host.generate("<i2l:my alias:1>").passes[0], expected([(style, 1)]))
    twice = saved(host, "twice", 4)
    host.networks.available_network_aliases["twice"] = SimpleNamespace(filename="another")
    assert near(host.generate("<i2l:twice:1>").passes[0], expected([(twice, 1)])), "an alias of two files is no name"
    saved(host, "new", 5)
    assert host.generate("<i2l:new:1>").comments == [] and ["new"] in host.networks.looked


@pytest.mark.parametrize(
    ("tag", "told"),
    [
        ("nobody:1", "Image to LoRA: <i2l:nobody>: there is no LoRA of this name."),
        ("style:a lot", "Image to LoRA: <i2l:style:a lot>: the weight must be a number, not 'a lot'."),
        ("text:1", "Image to LoRA: text.safetensors: not a usable safetensors file"),
        ("big:1", "Image to LoRA: big.safetensors: transformer_blocks.0.img_mod.1 of the loaded model is [768, 128]"),
    ],
)
def test_an_error_is_a_comment_and_the_others_act(host, style, tag, told):
    (host.folder / "text.safetensors").write_text("not a LoRA")
    from i2l_ext.converters.architectures import QWEN_IMAGE

    lora_of(QWEN_IMAGE, rank=1, paths=["transformer_blocks.0.img_mod.1"]).save(host.folder / "big.safetensors")
    made = host.generate(f"<i2l:{tag}> <i2l:style:1>")
    assert len(made.comments) == 1 and made.comments[0].startswith(told)
    assert near(made.passes[0], expected([(style, 1)]))


def test_what_acts_in_part_is_said(host, style):
    del host.model.transformer_blocks[2]
    host.load(host.model._inner[0])
    made = host.generate("<i2l:style:1>")
    assert made.comments == ["Image to LoRA: style: 12 of its modules are not in this model."]
    layer = host.model.transformer_blocks[0].attn.to_q
    layer.__class__ = type("Fused", (type(layer),), {"__call__": lambda self, x: self.forward(x)})
    host.generate("")
    assert "1 layers are computed in one piece" in host.generate("<i2l:style:1>").comments[1]


def test_an_interrupt_leaves_no_term_on_a_layer(host, style):
    plain = host.generate("a cat").passes[0]
    before = hooks_of(host.model)
    with pytest.raises(ZeroDivisionError):
        host.generate("<i2l:style:1>", fail=True)
    assert {name: hooks for name, hooks in hooks_of(host.model).items() if name} == {
        name: hooks for name, hooks in before.items() if name
    }
    assert torch.equal(host.generate("a cat").passes[0], plain) and hooks_of(host.model) == before


def test_a_webui_without_these_models_says_so_once(host, style):
    host.extra_networks.register_extra_network(host.generation.BranchNetwork(False))
    host.sd_model = SimpleNamespace()
    p = SimpleNamespace(sd_model=host.sd_model, comments={})
    p.comment = lambda text: p.comments.__setitem__(text, 1)
    for _ in range(2):
        host.extra_networks.activate(p, host.extra_networks.parse_prompt("<i2l:style:1>")[1])
        host.script.after_extra_networks_activate(p)
        host.script.process_before_every_sampling(p)
    assert list(p.comments) == [
        "Image to LoRA: <i2l:...> needs Forge Neo or SD.Next: this WebUI has no model that such a LoRA is for."
    ]


# SD.Next, whose models are pipelines of diffusers


class SDNext:
    """A stand-in for SD.Next, after its order of calls: a pipeline is chosen, the tags are handed over, it runs."""

    def __init__(self, host, monkeypatch):
        self.extra_networks, self.shared = host.extra_networks, SimpleNamespace(sd_model=None)
        monkeypatch.setattr(sys.modules["modules"], "shared", self.shared, raising=False)
        monkeypatch.delitem(sys.modules, "networks")
        monkeypatch.setitem(sys.modules, "modules.lora.lora_load", host.networks)
        del host.networks.update_available_networks_by_names
        host.networks.list_available_networks = lambda: [host.know(path) for path in host.folder.glob("*.safetensors")]
        self.extra_networks.register_extra_network(host.generation.PipelineNetwork())

    def generate(self, pipe, prompt, **other):
        self.shared.sd_model = pipe
        self.p = SimpleNamespace(extra_generation_params={})
        self.extra_networks.activate(self.p, self.extra_networks.parse_prompt(prompt)[1])
        return generate(pipe, **other)


@pytest.fixture
def sdnext(host, monkeypatch):
    return SDNext(host, monkeypatch)


def test_in_sdnext_its_pipeline_has_the_loras_of_the_prompt(host, sdnext, style, capsys):
    grey = saved(host, "style-grey", 2, rank=2)
    pipe = pipeline("qwen")
    plain, before, model = sdnext.generate(pipe, "a cat"), hooks_of(pipe.transformer), merged(pipe.transformer)
    found = sdnext.generate(pipe, "a cat <i2l:style:0.8:0.5>")
    twin = guided_by(pipeline("qwen"), merged(model, (style, 0.8)), merged(model, (grey, 0.5)))
    assert close(found, generate(twin)) and not close(found, plain, 1e-2)
    assert sdnext.p.extra_generation_params == {"i2l LoRAs": "style 0.8 0; style-grey 0 0.5"}
    hooks = hooks_of(pipe.transformer)
    other = type("Img2Img", (type(pipe),), {})(**pipe.components)  # the hires pass: another around the same transformer
    other.set_progress_bar_config(disable=True)
    del pipe
    gc.collect()
    assert torch.equal(sdnext.generate(other, "a cat <i2l:style:0.8:0.5>"), found)
    assert hooks_of(other.transformer) == hooks, "the same LoRAs are not read again"
    assert sdnext.generate(other, "<i2l:style> <i2l:nobody:1>") is not None
    assert "<i2l:nobody>: there is no LoRA of this name" in capsys.readouterr().out
    assert torch.equal(sdnext.generate(other, "a cat"), plain) and hooks_of(other.transformer) == before


def test_in_sdnext_another_model_has_them_too_and_the_first_no_more(sdnext, style):
    first, second = pipeline("qwen"), pipeline("qwen")
    sdnext.generate(first, "")
    before = hooks_of(first.transformer)
    found = sdnext.generate(first, "<i2l:style:1>")
    assert torch.equal(sdnext.generate(second, "<i2l:style:1>"), found) and hooks_of(first.transformer) == before


@pytest.mark.parametrize(("running", "network", "applies"), [
    ("ForgeNeoHost", "BranchNetwork", True), ("SDNextHost", "PipelineNetwork", True),
    ("A1111Host", "BranchNetwork", False),
])  # fmt: skip
def test_each_webui_gets_the_network_that_fits_it(host, monkeypatch, running, network, applies):
    from i2l_ext.webui import extension
    from i2l_ext.webui.hosts import running as hosts

    registered = []
    monkeypatch.setattr(hosts, "running_host", getattr(hosts, running))
    monkeypatch.setattr(webui, "register_network", registered.append)
    extension.generation_script()
    assert [(type(one).__name__, one._applies_loras) for one in registered] == [(network, applies)]
