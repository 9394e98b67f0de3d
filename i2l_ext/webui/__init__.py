"""The tab and the HTTP interface: layout (tab, panes), HTML (markup, html, results), words (texts, languages), hosts.

All of it runs in the WebUI's process, on the standard library and gradio. Anything heavier runs in the engine.
"""
