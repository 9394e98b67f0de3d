"""``i2l`` with the small models in its catalogue, for tests that need a process of their own.

``I2L_TEST_SLEEP``: seconds that each module takes to decode, so that there is time to stop the process.
"""

import os
import sys
import time

import small_models
from i2l_ext.commands import main
from i2l_ext.decoder import decode as decoder
from i2l_ext.models import catalogue

catalogue.MODELS.update(small_models.SMALL)
if pause := float(os.environ.get("I2L_TEST_SLEEP", "0")):
    whole = decoder._FactorLoader.__call__

    def slowly(self, path):
        print("decoding", flush=True)
        time.sleep(pause)
        return whole(self, path)

    decoder._FactorLoader.__call__ = slowly

if __name__ == "__main__":
    sys.exit(main.main(sys.argv[1:]))
