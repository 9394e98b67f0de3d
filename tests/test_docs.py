"""README and docs: links that lead somewhere, commands that run, words that are used for one thing."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from i2l_ext.commands.main import main
from i2l_ext.commands.reference import reference

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
FOR_USERS = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in (
    "glossary", "hardware", "install", "lora-files", "models", "recipes", "storage", "troubleshooting", "webui",
))]  # fmt: skip

ELSEWHERE = ("download", "pack", "train", "run", "discard")
"""Words of commands that need what a test lacks: a network, hours, a trainer's folder, the system's trash. They are not
run."""

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
    r"mend(s|ed)?": "repair", r"energy": "effect kept", r"that are none": "other",
}  # fmt: skip
"""A word that the glossary replaces -> what to write."""


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


def blocks(page):
    """The commands of each block of shell: lines that start with i2l, without comments, with files for placeholders."""
    for block in re.findall(r"```\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        lines = [shlex.split(line, comments=True)[1:] for line in block.splitlines() if line.startswith("i2l ")]
        yield [[STANDS_FOR.get(word, word) for word in line] for line in lines if not set(line) & set(ELSEWHERE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the commands name: pictures, LoRAs, a base."""
    from i2l_ext.mini.sampler import SAMPLES, WEIGHTS

    here = tmp_path_factory.mktemp("docs")
    pictures = [Image.open(path).convert("RGB").resize((96, 96)) for path in sorted(SAMPLES.glob("*.png"))[:2]]
    for name, picture in zip(("photo.jpg", "more.png"), pictures, strict=True):
        picture.save(here / name)
    pictures[0].resize((800, 400)).save(here / "wide.jpg")
    for name in ("folder/one.png", "pictures/one.png", "models/Lora/.keep", "path/to/base/.keep", "old_loras/.keep"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".png"):
            pictures[0].save(here / name)
    words = ["make", str(here / "pictures/one.png"), "--model", "mini", "--no-cache", "--lora-dir", str(here)]
    assert main([*words, "--name", "my_style"]) == 0
    for name in ("a", "b", "old_loras/c", "models/Lora/my_style", "demo/meadow"):
        (here / name).parent.mkdir(exist_ok=True)
        shutil.copy(here / "my_style.safetensors", here / f"{name}.safetensors")
    shutil.copy(WEIGHTS / "base.safetensors", here / "path/to/base/base.safetensors")
    return here


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page))], ids=lambda page: page.name)
def test_the_commands_run_in_their_order(page, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("I2L_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("I2L_MODELS", str(tmp_path / "models"))
    for number, lines in enumerate(blocks(page)):
        monkeypatch.chdir(shutil.copytree(folder, tmp_path / str(number)))
        for line, words in enumerate(lines):
            ours = [f"{line}-{word}" if word in ("OUT/", "lora.safetensors") else word for word in words]
            assert main(ours) == 0, (words, capsys.readouterr().err)


@pytest.mark.parametrize("page", FOR_USERS, ids=lambda page: page.name)
def test_one_word_means_one_thing(page):
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for pattern, better in AVOIDED.items():
        found = re.search(rf"\b{pattern}\b", text, re.IGNORECASE)
        assert not found, f"{page.name}: {found and found[0]}; write {better}"


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
