"""What the extension sees of a WebUI: these modules, and no more of them than docs promise."""
