"""The WebUI executes this file when it starts and whenever its page is reloaded."""

from i2l_ext.webui import extension

extension.register()
BranchScript = extension.generation_script()  # the WebUI looks for such classes among this file's names
