"""``python -m i2l_ext`` is the command ``i2l``."""

import sys

from i2l_ext.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
