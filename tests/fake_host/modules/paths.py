import os
from pathlib import Path

script_path = os.environ["FAKE_ROOT"]
models_path = str(Path(script_path) / "models")
