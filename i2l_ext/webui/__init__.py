"""The tab: what it shows (html, texts), what it asks for (desk), where it stands (host), and how others ask (api).

This runs in the WebUI's process: standard library and gradio, and nothing heavier, until a job starts its engine.
"""
