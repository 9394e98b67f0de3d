"""README and docs: links that lead somewhere, commands that run, words that are used for one thing."""

import ast
import re
import shlex
import shutil
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

import pytest
from PIL import Image

from hubs import FakeHub
from i2l_ext.commands.main import main
from i2l_ext.commands.reference import reference
from i2l_ext.models import catalogue
from i2l_ext.models import hubs as hubs_of_models
from i2l_ext.webui.languages import read_words
from i2l_ext.webui.texts import all_texts

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
FOR_USERS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

NOT_RUN = {
    "i2l run ": "needs a trainer; tests/test_training_run.py runs a stand-in from such a folder",
    "i2l train configs/train/mini.yaml": "takes hours; tests/test_training.py trains small models",
    "accelerate launch ": "needs several cards; tests/test_batch.py and test_training.py launch two processes",
    "i2l models diffsynth": "downloads packages; tests/test_templates_setup.py has a stand-in of pip",
    "i2l models download z-image-v2": "brings code; tests/test_store_download.py fetches a template",
    "i2l models trust ": "asks a person; tests/test_templates.py answers",
    "i2l make pictures/ --model z-image-v2": "runs that code; tests/test_templates.py runs a template of ours",
    "git clone THIS-REPOSITORY": "tests/test_install.py and tests/test_comfyui.py stand for what follows",
    "cd ComfyUI/custom_nodes": "the same",
    "python image-to-lora/install.py": "the same",
    "python install.py ": "makes an environment: tests/test_install.py with a stand-in of pip; CI runs `test` itself",
    "python /path/to/start/train.py": "needs a trainer; benchmarks/trainers.py runs them",
    "cd TRAINER_FOLDER": "the same",
}
"""The beginning of a command in the docs that is not run here -> why, and what stands in for it."""

STANDS_FOR = {
    "FILE": "my_style.safetensors",
    "FOLDER": "old_loras",
    "BASE": "path/to/base",
    "lokr.safetensors": "a.safetensors",
    "dora.safetensors": "b.safetensors",
    "qwen_image_bf16.safetensors": "path/to/base/base.safetensors",
}

AVOIDED = {
    r"dialects?": "key format", r"held against": "checked by", r"whoever": "who", r"init file": "start folder",
    r"mend(s|ed)?": "repair", r"energy": "effect kept", r"that are none": "other", r"training folder": "start folder",
    r"key names for": "key format for", r"colors?": "colour", r"gray": "grey", r"center(ed)?": "centre",
    r"behaviors?": "behaviour", r"licens(e|es)": "licence", r"cancel(ed|ing)": "cancelled",
    r"\w+(n|r|m|t)iz(e|es|ed|ing|ation)": "-is-",
}  # fmt: skip
"""A word that the glossary replaces, or that is spelled otherwise in Britain -> what to write."""


def anchors(page):
    """GitHub's, of a page's headings."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_inside_the_repository_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        to = (page.parent / name).resolve() if name else page
        assert to.exists(), link
        assert not anchor or anchor in anchors(to), link


SHELL = ("i2l ", "python ", "pip ", "git ", "cd ", "accelerate ", "sh ", "bash ", "curl ")


def shell(page):
    """The commands of each block of shell, without comments."""
    for block in re.findall(r"```\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        yield [line.partition(" #")[0].strip() for line in block.splitlines() if line.startswith(SHELL)]


def left_out(line):
    """The reason why a command is not run, if there is one."""
    if line == "i2l train configs/train/mini.yaml --list":
        return None
    return next((begins for begins in NOT_RUN if line.startswith(begins)), None)


def blocks(page):
    """The words of each command that is run, block by block, with files for placeholders."""
    for lines in shell(page):
        words = [shlex.split(line)[1:] for line in lines if line.startswith("i2l ") and not left_out(line)]
        yield [[STANDS_FOR.get(word, word) for word in line] for line in words]


def test_every_command_is_run_or_said_not_to_be():
    written = [line for page in PAGES for lines in shell(page) for line in lines]
    assert [line for line in written if not line.startswith("i2l ") and not left_out(line)] == []
    assert {left_out(line) for line in written} - {None} == set(NOT_RUN), "it is in no page any more"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the commands name: pictures, LoRAs, a base."""
    from i2l_ext.mini.sampler import SAMPLES, WEIGHTS

    here = tmp_path_factory.mktemp("docs")
    pictures = [Image.open(path).convert("RGB").resize((96, 96)) for path in sorted(SAMPLES.glob("*.png"))[:2]]
    for name, picture in zip(("photo.jpg", "more.png", "a.jpg", "b.jpg"), pictures * 2, strict=True):
        picture.save(here / name)
    pictures[0].resize((800, 400)).save(here / "wide.jpg")
    for name in ("folder/one.png", "pictures/one.png", "models/Lora/.keep", "path/to/base/.keep", "old_loras/.keep"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".png"):
            pictures[0].save(here / name)
    words = ["make", str(here / "pictures/one.png"), "--model", "mini", "--no-cache", "--lora-dir", str(here)]
    assert main([*words, "--name", "my_style"]) == 0
    for name in ("a", "b", "old_loras/c", "models/Lora/my_style", "models/Lora/old", "demo/meadow"):
        (here / name).parent.mkdir(exist_ok=True)
        shutil.copy(here / "my_style.safetensors", here / f"{name}.safetensors")
    shutil.copy(WEIGHTS / "base.safetensors", here / "path/to/base/base.safetensors")
    return here


@pytest.fixture
def hub(world, monkeypatch, tmp_path):
    """A hub on this machine with a small model in the place of qwen-image-style."""
    pytest.importorskip("huggingface_hub")
    small = replace(catalogue.MODELS["small"], name="qwen-image-style")
    monkeypatch.setitem(catalogue.MODELS, small.name, small)
    made = FakeHub()
    for part in small.parts:
        made.add(part.repo, part.files[0], world.file(part.id).read_bytes())
    for name, client in hubs_of_models.HUBS.items():
        monkeypatch.setitem(hubs_of_models.HUBS, name, partial(client, endpoint=made.url))
    for name in ("XDG_DATA_HOME", "MODELSCOPE_HOME", "MODELSCOPE_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    yield made
    made.close()


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page))], ids=lambda page: page.name)
def test_the_commands_run_in_their_order(page, folder, world, hub, tmp_path, monkeypatch, capsys):
    """Downloads come from a hub on this machine; what is packed is a small model."""
    for number, lines in enumerate(blocks(page)):
        here = shutil.copytree(folder, tmp_path / str(number))
        monkeypatch.chdir(here)
        shutil.copytree(ROOT / "configs", here / "configs")
        for line, words in enumerate(lines):
            monkeypatch.setenv("I2L_MODELS", str(models := here / f"weights-{line}"))
            if "pack" in words:
                shutil.copytree(world.models, models)
            ours = [f"{line}-{word}" if word in ("OUT/", "lora.safetensors") else word for word in words]
            assert main([*ours, *["--yes"] * ("download" in words)]) == 0, (words, capsys.readouterr().err)


def avoided(text):
    """The first word of a text that is to be avoided, and what to write; names of code and addresses left out."""
    plain = re.sub(r"```.*?```|``.*?``|`[^`]*`|https?://\S+|--[\w-]+", "", text, flags=re.DOTALL)
    for pattern, better in AVOIDED.items():
        if found := re.search(rf"(?<![\w.])({pattern})(?!\w|\.\w|: true| ::)", plain, re.IGNORECASE):
            return f"{found[0]}; write {better}"
    return None


@pytest.mark.parametrize("page", FOR_USERS, ids=lambda page: page.name)
def test_one_word_means_one_thing(page):
    assert avoided(page.read_text(encoding="utf-8")) is None


def sentences(path):
    """What a module may say to a person: its texts of several words, docstrings left out, X for what stands in them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value


def test_help_the_tab_and_messages_use_the_same_words():
    rooms = [*(ROOT / "i2l_ext").rglob("*.py"), *(ROOT / "converters").rglob("*.py"), ROOT / "install.py"]
    said = [(path, text) for path in rooms for text in sentences(path) if " " in text.strip()]
    said += [("the tab", text) for text in all_texts()] + [("help", line) for line in reference().splitlines()]
    said += [("languages", text) for pair in read_words("en-phrases").items() for text in pair]
    found = [f"{where}: {text[:80]!r}: {avoided(text)}" for where, text in said if avoided(text)]
    assert len(said) > 1000 and found == [], "\n".join(found)


def test_the_reference_of_commands_is_what_help_says():
    written = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert written == reference(), "python -m i2l_ext.commands.reference > docs/commands.md"


def test_the_drawing_of_the_house_names_every_room():
    tomllib = pytest.importorskip("tomllib")
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    layers = tools["importlinter"]["contracts"][0]["layers"]
    rooms = {room.strip() for line in layers for room in line.split("|")}
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawing, table = page.partition("## The rooms")[2].partition("| room |")[::2]
    assert not [room for room in rooms if not re.search(rf"\b{room}\b", drawing)]
    assert not [room for room in rooms if not re.search(rf"`{room}(/|\.py)`", table)]


@pytest.mark.parametrize("page", sorted(ROOT.glob("README.*.md")), ids=lambda page: page.name)
def test_a_translated_readme_has_the_same_sections_commands_and_tables(page):
    """What needs no translation: a section or a row that is missing there is seen."""

    def skeleton(text):
        """Headings and rows, each as what is compared and as it is written; and the links."""
        heads = [(line.split()[0], line) for line in re.findall(r"^#+ .+$", text, re.MULTILINE)]
        rows = [(re.findall(r"`[^`]+`", row), row) for row in re.findall(r"^\|.+\|$", text, re.MULTILINE)]
        return heads, rows, set(re.findall(r"\]\(((?:docs|benchmarks)/[^)#\s]+)", text))

    english = ROOT / "README.md"
    assert list(shell(page)) == list(shell(english))
    *ours, links = skeleton(page.read_text(encoding="utf-8"))
    *theirs, wanted = skeleton(english.read_text(encoding="utf-8"))
    for own, other in zip(ours, theirs, strict=True):
        both = zip_longest(own, other, fillvalue=(None, "nothing"))
        first = next((f"{page.name}: {one[1]}\nREADME.md: {two[1]}" for one, two in both if one[0] != two[0]), None)
        assert first is None, f"the first that differs:\n{first}"
    assert wanted - links == set()
