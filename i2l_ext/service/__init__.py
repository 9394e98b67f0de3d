"""What every host's part asks of the engine: requests, pictures, names, settings; and the protocol ``Host``.

All of it runs in the host's process, on the standard library.
"""
