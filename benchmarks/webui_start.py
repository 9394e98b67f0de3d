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

from results import record, table

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
from i2l_ext.service.service import Service
from i2l_ext.webui.hosts.standalone import StandaloneHost
from i2l_ext.webui.tab import build_tab
state = Path(sys.argv[2])
service = Service(StandaloneHost(state, lora_folder=state / "Lora"), state)
with gr.Blocks() as page:
    build_tab(service)
print(json.dumps({"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu, "empty": empty,
                  "gradio": gr.__version__,
                  "heavy": [name for name in ("torch", "transformers") if name in sys.modules]}))
"""

PYTHONS = (
    sys.executable,
    *(ROOT / ".private" / f"gradio-{version}" / "bin" / "python" for version in ("4.40", "3.41")),
)
"""Of this environment, and of those that ``python install.py browser`` makes."""


def main() -> None:
    rounds, rows = int(sys.argv[1]) if len(sys.argv) > 1 else 5, []
    for python in filter(Path.exists, map(Path, PYTHONS)):
        runs = []
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as state:
                command = [str(python), "-c", CODE, str(ROOT), state]
                out = subprocess.run(command, capture_output=True, text=True, check=True)
            runs.append(json.loads(out.stdout.splitlines()[-1]))
        medians = (f"{statistics.median(run[key] for run in runs):.3f}" for key in ("wall", "cpu", "empty"))
        least = f"{min(run['wall'] for run in runs):.3f}"
        heavy = ", ".join(sorted({name for run in runs for name in run["heavy"]})) or "no"
        rows.append([runs[0]["gradio"], *medians, least, heavy])
    head = ["gradio", "seconds", "of the processor", "of an empty page", "seconds, least", "torch or transformers"]
    text = f"What the tab adds to a start once gradio is loaded, medians of {rounds}; 0.2 s are asked.\n\n"
    record("Start of the WebUI", text + table(head, rows), script=__file__)


if __name__ == "__main__":
    main()
