"""A stand-in for a WebUI: what was seen of the real ones, and nothing else. python webui.py PORT, with FAKE_ROOT.

Its extension lies in FAKE_ROOT/extensions/; FAKE_FLAVOUR is a1111, forge, forge-neo or sdnext; FAKE_LANGUAGE is the
language that its user has chosen, FAKE_CSS are style sheets of a real one, to be looked at instead of CSS. As in the
real ones: reading the checkpoint loads it, the dictionary of LoRAs is emptied and filled without a lock, one dictionary
translates the whole page, and the style sheet colours inner elements.
"""

import importlib.util
import json
import os
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

HERE, ROOT = Path(__file__).resolve().parent, Path(os.environ["FAKE_ROOT"])
sys.path.insert(0, str(HERE))
os.chdir(ROOT)

import gradio as gr  # noqa: E402
import uvicorn  # noqa: E402
from fastapi import FastAPI, Request  # noqa: E402
from fastapi.responses import HTMLResponse, JSONResponse, Response  # noqa: E402
from modules import script_callbacks, shared  # noqa: E402

EXTENSIONS = sorted((ROOT / "extensions").iterdir())
IS_SDNEXT = shared.FLAVOUR == "sdnext"
TITLES = {
    "sdnext": {"txt2img": "Text", "img2img": "Image"},
    "a1111": {"txt2img": "txt2img", "img2img": "img2img"},
}.get(shared.FLAVOUR, {"txt2img": "Txt2img", "img2img": "Img2img"})
A_FILE = 0.02
"""Seconds in which the header of a LoRA is read, for the list."""

networks = ModuleType("networks")
networks.available_networks, networks.listed = {}, 0


def process_network_files(names=None):
    for path in sorted(Path(shared.cmd_opts.lora_dir).rglob("*.safetensors")):
        if names and path.stem not in names:
            continue
        time.sleep(A_FILE)
        networks.available_networks[path.stem] = SimpleNamespace(filename=str(path))


def list_available_networks():
    networks.listed += 1
    networks.available_networks.clear()
    process_network_files()


networks.list_available_networks = list_available_networks
if IS_SDNEXT:
    lora_load = ModuleType("modules.lora.lora_load")
    lora_load.available_networks, lora_load.list_available_networks = (
        networks.available_networks,
        list_available_networks,
    )
    package = ModuleType("modules.lora")
    package.__path__, package.lora_load = [], lora_load
    package.__spec__ = importlib.util.spec_from_loader("modules.lora", None, is_package=True)
    sys.modules |= {"modules.lora": package, "modules.lora.lora_load": lora_load}
else:
    networks.update_available_networks_by_names = process_network_files
    sys.modules["networks"] = networks


def load_scripts():
    """Each file on its own, in no package and not in sys.modules; the extension's root on the path meanwhile."""
    for extension in EXTENSIONS:
        sys.path.insert(0, str(extension))
        for path in sorted((extension / "scripts").glob("*.py")):
            spec = importlib.util.spec_from_file_location(path.name, path)
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        if shared.FLAVOUR == "a1111":
            sys.path.remove(str(extension))


def cards():
    return "".join(f'<div class="card" data-name="{name}">{name}</div>' for name in sorted(networks.available_networks))


def refresh():
    list_available_networks()
    return cards()


def build_networks(name):
    """A tab of LoRA cards; in SD.Next a part of the page that a button opens."""
    if not IS_SDNEXT:
        with gr.Tabs(elem_id=f"{name}_extra_tabs"):
            with gr.Tab("Generation"):
                gr.HTML("")
            with gr.Tab("Lora"):
                shown = gr.HTML(cards(), elem_id=f"{name}_lora_cards")
                again = gr.Button("refresh", elem_id=f"{name}_lora_extra_refresh_internal")
                again.click(refresh, inputs=[], outputs=[shown])
        return
    show = gr.Button("Networks", elem_id=f"{name}_extra_networks_btn")
    with gr.Column(visible=False, elem_id=f"{name}_extra_networks") as networks_part:
        with gr.Tabs(elem_id=f"{name}_extra_tabs"):
            with gr.Tab("Model"):
                gr.HTML("")
            with gr.Tab("Lora"):
                shown = gr.HTML(cards(), elem_id=f"{name}_lora_cards")
        again = gr.Button("refresh", elem_id=f"{name}_extra_refresh")
        again.click(refresh, inputs=[], outputs=[shown])
    is_shown = gr.State(False)
    show.click(lambda now: (not now, gr.update(visible=not now)), inputs=[is_shown], outputs=[is_shown, networks_part])


def build():
    for options in script_callbacks.settings:
        options()
    list_available_networks()
    interfaces = [entry for function in script_callbacks.tabs for entry in function()]  # outside of any Blocks
    with gr.Blocks(title="Stand-in", analytics_enabled=False) as demo:
        with gr.Tabs(elem_id="tabs"):
            for name, title in TITLES.items():
                with gr.Tab(title, elem_id=f"tab_{name}"):
                    gr.Textbox(label="Prompt", elem_id=f"{name}_prompt", lines=2)
                    gr.HTML("<span>left</span> <span>Cancel</span> <span>File</span>", elem_id=f"{name}_words")
                    build_networks(name)
            for blocks, title, id in interfaces:
                with gr.Tab(title, elem_id=f"tab_{id}"):
                    blocks.render()
    return demo


CSS = (
    """
.gradio-container .prose span { color: rgb(1, 2, 3); }
.gradio-container .prose a { color: unset; }
.gradio-slider input[type="number"] { width: 6em; }
"""
    + """
:root, .light, .dark {
    --body-text-color: #e0e0e0; --body-text-color-subdued: #b0b0b0; --body-background-fill: #101010;
    --background-fill-primary: #404040; --background-fill-secondary: none; --border-color-primary: #101010;
    --block-background-fill: none; --block-title-text-color: #b0b0b0; --block-label-text-color: #d0d0d0;
    --panel-background-fill: none; --color-accent: #489292; --color-accent-soft: #404040; --input-border-width: 0;
    --input-background-fill: #303030; --input-placeholder-color: #707070; --checkbox-background-color: #707070;
    --button-primary-background-fill: #3e7d7d; --button-primary-text-color: #e0e0e0;
    --button-secondary-background-fill: #202020; --button-secondary-text-color: #e0e0e0;
}
button { max-width: 400px; white-space: nowrap; }
img { background-color: #101010; }
.gradio-slider { max-width: 200px; }
label.block span { padding: 0; margin-top: -4px; }
.tab-nav { zoom: 110%; }
"""
    * IS_SDNEXT
)
"""Rules that reach into our tab. SD.Next's standard theme is dark for browsers that prefer light, too."""
BRIDGE = "function gradioApp(){return document}"
TRANSLATES = """
window.localization = WORDS;
const hostWalk = (root) => {
    const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const told = localization[walker.currentNode.textContent.trim()];
        if (told !== undefined) walker.currentNode.textContent = told;
    }
};
document.addEventListener("DOMContentLoaded", () => {
    const observer = new MutationObserver((all) => all.forEach((one) => one.addedNodes.forEach(hostWalk)));
    observer.observe(document.body, {childList: true, subtree: true});
});
"""


def words():
    """What every extension brings for the chosen language, in one dictionary for the whole page."""
    found = {}
    for extension in EXTENSIONS:
        path = extension / "localizations" / f"{shared.opts.localization}.json"
        if path.is_file():
            found |= json.loads(path.read_text(encoding="utf-8"))
    return json.dumps(found)


def head():
    ours = [
        path.read_text(encoding="utf-8")
        for extension in EXTENSIONS
        for path in sorted((extension / "javascript").glob("*.js"))
    ]
    scripts = "".join(f"<script>{script}</script>" for script in (BRIDGE, TRANSLATES.replace("WORDS", words()), *ours))
    sheets = [path.read_text(encoding="utf-8") for one in EXTENSIONS if (path := one / "style.css").is_file()]
    real = [Path(path).read_text(encoding="utf-8") for path in os.environ.get("FAKE_CSS", "").split(os.pathsep) if path]
    return scripts + "".join(f"<style>{sheet}</style>" for sheet in (*sheets, *(real or [CSS])))


def main(port):
    load_scripts()
    demo = build()
    app = FastAPI()

    @app.middleware("http")
    async def inject(request: Request, call_next):
        response = await call_next(request)
        if request.url.path != "/" or "text/html" not in response.headers.get("content-type", ""):
            return response
        body = b"".join([piece async for piece in response.body_iterator])
        return HTMLResponse(body.replace(b"</head>", head().encode() + b"</head>", 1), response.status_code)

    @app.get("/fake/facts")
    def facts():
        import modules.sd_models as models

        weights = [name for name in ("torch", "transformers") if name in sys.modules]
        model = models.model_data.sd_model
        return JSONResponse({
            "listed": networks.listed, "loras": sorted(networks.available_networks),
            "hash": getattr(model, "current_lora_hash", None),
            "unloaded": models.moves.count("unloaded"), "moves": models.moves, "device": model.device, "heavy": weights,
            "loaded_by_reading": models.model_data.loaded_by_reading, "options": sorted(shared.opts.data_labels),
            "gradio": gr.__version__,
        })  # fmt: skip

    @app.post("/fake/reload")
    def reload():
        load_scripts()
        return Response("reloaded")

    for function in script_callbacks.started:
        function(demo, app)
    demo.queue()
    gr.mount_gradio_app(app, demo, path="/")
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    threading.Thread(target=lambda: print("up", flush=True)).start()
    server.run()


if __name__ == "__main__":
    main(int(sys.argv[1]))
