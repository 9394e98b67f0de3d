"""What the attacks on this program share: `fuzz.py`, `faults.py` and `load.py` beside this folder are the commands."""
