"""The stand-alone page for the browser tests: python alone.py PORT, with FAKE_ROOT."""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from i2l_ext.webui import standalone

lora_folder = Path(os.environ["FAKE_ROOT"]) / "models" / "Lora"
page, _ = standalone.start_page("127.0.0.1", int(sys.argv[1]), lora_folder=lora_folder)
print("up", flush=True)
time.sleep(3600)
