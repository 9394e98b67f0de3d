"""A stand-in for a WebUI: what was seen of the three, and nothing else. python webui.py PORT, with FAKE_ROOT.

Its extension lies in FAKE_ROOT/extensions/; FAKE_FLAVOUR is a1111, forge or forge-neo.
"""

import importlib.util
import os
import sys
import threading
from pathlib import Path
from types import ModuleType

HERE, ROOT = Path(__file__).resolve().parent, Path(os.environ["FAKE_ROOT"])
sys.path.insert(0, str(HERE))
os.chdir(ROOT)

import gradio as gr  # noqa: E402
import uvicorn  # noqa: E402
from fastapi import FastAPI, Request  # noqa: E402
from fastapi.responses import HTMLResponse, JSONResponse, Response  # noqa: E402
from modules import script_callbacks, shared  # noqa: E402

EXTENSIONS = sorted((ROOT / "extensions").iterdir())
networks = ModuleType("networks")
networks.available, networks.listed = {}, 0


def list_available_networks():
    networks.listed += 1
    networks.available = {path.stem: path for path in Path(shared.cmd_opts.lora_dir).rglob("*.safetensors")}


networks.list_available_networks = list_available_networks
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
    list_available_networks()
    return "".join(f'<div class="card" data-name="{name}">{name}</div>' for name in sorted(networks.available))


def build():
    for options in script_callbacks.settings:
        options()
    interfaces = [entry for function in script_callbacks.tabs for entry in function()]  # outside of any Blocks
    with gr.Blocks(title="Stand-in", analytics_enabled=False) as demo:
        with gr.Tabs(elem_id="tabs"):
            for name in ("txt2img", "img2img"):
                title = name.capitalize() if shared.FLAVOUR.startswith("forge") else name
                with gr.Tab(title, elem_id=f"tab_{name}"):
                    gr.Textbox(label="Prompt", elem_id=f"{name}_prompt", lines=2)
                    with gr.Tabs(elem_id=f"{name}_extra_tabs"):
                        with gr.Tab("Generation"):
                            gr.HTML("")
                        with gr.Tab("Lora"):
                            shown = gr.HTML(cards(), elem_id=f"{name}_lora_cards")
                            again = gr.Button("refresh", elem_id=f"{name}_lora_extra_refresh_internal")
                            again.click(cards, inputs=[], outputs=[shown])
            for blocks, title, id in interfaces:
                with gr.Tab(title, elem_id=f"tab_{id}"):
                    blocks.render()
    return demo


BRIDGE = "<script>function gradioApp(){return document}</script>"


def head():
    scripts = "".join(
        f"<script>{path.read_text(encoding='utf-8')}</script>"
        for extension in EXTENSIONS
        for path in sorted((extension / "javascript").glob("*.js"))
    )
    styles = "".join(
        f"<style>{(extension / 'style.css').read_text(encoding='utf-8')}</style>"
        for extension in EXTENSIONS
        if (extension / "style.css").is_file()
    )
    return BRIDGE + scripts + styles


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
        return JSONResponse({
            "listed": networks.listed, "loras": sorted(networks.available), "hash": shared.sd_model.current_lora_hash,
            "unloaded": len(models.unloaded), "heavy": weights, "options": sorted(shared.opts.data_labels),
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
