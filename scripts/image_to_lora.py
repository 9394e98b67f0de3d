"""The WebUI's door. The WebUI executes this file, again at every reload of its page."""

from i2l_ext.webui import extension

extension.register()
