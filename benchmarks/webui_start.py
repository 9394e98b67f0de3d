"""What the extension adds to a WebUI's start: seconds of importing and building the tab, once gradio is loaded.

    python benchmarks/webui_start.py [RUNS]

``empty`` is the CPU time that gradio takes for a gr.Blocks with nothing in it, which is in the other two as well.
Each run is a process of its own. The bound is 0.2 s, and neither torch nor transformers may be imported by it.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = """
import json, sys, time
from pathlib import Path
import gradio as gr
sys.path.insert(0, sys.argv[1])
with gr.Blocks():
    pass
begun = time.process_time()
with gr.Blocks():
    pass
empty = time.process_time() - begun
start = time.perf_counter()
cpu = time.process_time()
from i2l_ext.webui.desk import Desk
from i2l_ext.webui.host import Alone
from i2l_ext.webui.tab import build
state = Path(sys.argv[2])
desk = Desk(Alone(state, lora_folder=state / "Lora"), state)
with gr.Blocks() as page:
    build(desk)
print(json.dumps({"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu, "empty": empty,
                  "gradio": gr.__version__,
                  "heavy": [name for name in ("torch", "transformers") if name in sys.modules]}))
"""

if __name__ == "__main__":
    runs = []
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 5):
        with tempfile.TemporaryDirectory() as state:
            out = subprocess.run(
                [sys.executable, "-c", CODE, str(ROOT), state], capture_output=True, text=True, check=True
            )
        runs.append(json.loads(out.stdout.splitlines()[-1]))
    for key in ("wall", "cpu", "empty"):
        values = [run[key] for run in runs]
        print(f"gradio {runs[0]['gradio']}: {key} {statistics.median(values):.3f} s (least {min(values):.3f})")
    print("heavy imports:", sorted({name for run in runs for name in run["heavy"]}) or "none")
